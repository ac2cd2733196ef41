"""An aborted download leaves nothing on the store, also after parts of it were committed."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from pathlib import Path

from ssvm_worker.errors import WorkerError
from ssvm_worker.runner.messages import Message
from ssvm_worker.runner.run import run_job
from tests.archives import ova_of, ovf_with_hardware
from tests.servers.broker import Broker
from tests.servers.http import HttpServer
from tests.vmdk_writer import stream_optimized
from tests.waiting import until

from .agents import NFS, PLACE, Agent, settings_of

ROOT, DATA = (stream_optimized(random.Random(size).randbytes(size)) for size in (300_000, 8_000_000))


def test_ova(broker: Broker, tmp_path: Path, http_server: HttpServer) -> None:
    """An OVA that is aborted after its first disk was committed leaves no disk."""
    files = {"vm.ovf": ovf_with_hardware("root.vmdk", "data.vmdk"), "root.vmdk": ROOT, "data.vmdk": DATA}
    package = ova_of(files)
    url = http_server.serve("a.ova", package, stall_after=len(package) - len(DATA) // 3)
    sections = {"cloudstack": {"stores": {PLACE: "primary"}}, "download": {"allow_networks": ["127.0.0.0/8"]}}
    settings = settings_of(broker, tmp_path, ledger={"claim_s": 5}, **sections)
    agent, store = Agent(settings), tmp_path / "store"
    fields = {"resourceType": "TEMPLATE", "installPath": "template/tmpl/2/202", "_store": NFS, "url": url}
    fields |= {"name": "202-2-a", "id": 202, "format": "OVA"}
    job_id = agent.send("DownloadCommand", **fields)["jobId"]

    def work() -> None:
        with suppress(WorkerError):
            run_job(settings, Message("download", [{"job_id": job_id}], {}, job_id))

    worker = threading.Thread(target=work)
    worker.start()
    until(lambda: bool(list(store.rglob("202-disk0.vmdk"))), "the first disk is committed")
    agent.send("DownloadProgressCommand", **fields, jobId=job_id, request="ABORT")
    worker.join()
    assert agent.services.jobs.job(job_id).state == "cancelled"
    assert [each for each in store.rglob("*") if each.is_file()] == []
    assert agent.send("ListTemplateCommand", store=NFS)["templateInfos"] == {}
