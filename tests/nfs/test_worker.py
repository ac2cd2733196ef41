"""A worker whose store is a real export: while its server hangs, all other work continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import images
from tests.nfs.server import Server
from tests.nfs.test_mounting import mounted
from tests.servers.http import HttpServer
from tests.servers.worker import Site, until
from tests.waiting import CLAIM_S, PATIENCE_S, RECONNECT_S, SLOWNESS

pytest_plugins = ["tests.servers.broker", "tests.servers.http", "tests.servers.worker"]

IMAGE = images.mbr(6 << 20)
CHECKSUM = f"sha256:{hashlib.sha256(IMAGE).hexdigest()}"


def test_hung_server(
    make_site: Callable[..., Site],
    server: Server,
    http_server: HttpServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A job that hangs in its store is freed and waits uncounted, others continue, and all complete."""
    export, other = server.export("worker"), tmp_path / "other"
    other.mkdir()
    site = make_site(
        stores={"primary": {"url": export.url}, "other": {"url": f"file://{other}"}},
        nfs={"probe_s": 3 * SLOWNESS, "probe_every_s": 1, "give_up_s": 3 * SLOWNESS, "mount_s": PATIENCE_S},
        ledger={"claim_s": 3 * CLAIM_S, "reap_s": 1},
        worker={"concurrency": 1, "drain_s": 1},
        download={"allow_networks": ["127.0.0.0/8"]},
    )
    worker = site.start()
    asked = {"account": "1", "format": "raw", "checksum": CHECKSUM}
    slow = http_server.serve("slow", IMAGE, rate=256 << 10)
    stuck = site.submit("download", url=slow, id="stuck", **asked)
    until(lambda: _bytes(site, stuck) > 1 << 20, "the job is in the middle of its bytes")
    [mount] = mounted(export)

    server.hang()
    http_server.serve("slow", IMAGE)
    record = site.wait(stuck, "queued")
    assert record.tries == 0
    assert (record.attempts[0].error or {})["error"] == "StoreAway"
    cause = _answers_of_an_operator(site, stuck, capsys)
    assert ["no answer within" in each for each in cause] == [True, True], cause
    free = site.submit("download", url=http_server.serve("fast", IMAGE), id="free", stores=["other"], **asked)
    assert site.wait(free).state == "succeeded"
    assert (other / "template/tmpl/1/free/free.raw").read_bytes() == IMAGE
    assert site.ledger.get(stuck).state in ("queued", "running"), "it may be in another attempt, which hangs too"

    server.go_on()
    until(lambda: site.ledger.get(stuck).ended, "the job ends", PATIENCE_S + RECONNECT_S)
    assert site.ledger.get(stuck).state == "succeeded"
    below = "template/tmpl/1/stuck"
    assert export.files() == [f"{below}/manifest.json", f"{below}/stuck.raw", f"{below}/template.properties"]
    assert export.read(f"{below}/stuck.raw") == IMAGE
    assert mounted(export) == [mount], "as it was"

    worker.terminate()
    assert mounted(export) == [], "the worker had mounted it"


def _answers_of_an_operator(site: Site, job_id: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return what ``ssvm job`` says about the job, and ``ssvm doctor`` about its store."""
    from ssvm_worker.cli import main  # seconds, in a VM

    capsys.readouterr()
    main(["job", job_id, "--config", str(site.file)])
    job = capsys.readouterr().out
    main(["doctor", "--json", "--config", str(site.file)])
    doctor = [each for each in json.loads(capsys.readouterr().out) if each["check"] == "store primary"]
    return job, json.dumps(doctor)


def _bytes(site: Site, job_id: str) -> int:
    return int((site.ledger.get(job_id).progress or {}).get("bytes", 0))
