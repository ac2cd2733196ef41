"""Documents of a real worker fit the JSON Schemas: records, results, events and callbacks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ssvm_worker.wiring.assembly import shown
from tests import images
from tests.documents import check_document
from tests.e2e.test_odd_messages import envelope
from tests.servers.http import HttpServer
from tests.servers.receiver import Receiver
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e


def test_documents(worker_site: Site, http_server: HttpServer) -> None:
    """Each record, event and callback of jobs that succeed, fail and are refused fits its schema."""
    url, missing = http_server.serve("image", images.mbr(1 << 20)), http_server.serve("none", b"", status=404)
    names = {"account": "contract", "id": "201"}
    jobs: dict[str, dict[str, Any]] = {
        "download": {**names, "url": url},
        "verify": {**names},
        "upload": {**names, "kind": "template", "url": http_server.take("target")},
        "transfer": {"source": "primary", "key": "template/tmpl/contract/201", "store": "primary"}
        | {"to": "template/tmpl/contract/202"},
        "cleanup": {"dry_run": True},
        "delete": {**names},
    }
    with Receiver() as receiver:
        for job, fields in jobs.items():
            job_id = worker_site.submit(job, job_id=f"contract-{job}", callback_url=receiver.url, **fields)
            record = worker_site.wait(job_id, "succeeded")
            check_document("record", shown(record))
            check_document(f"{job}.result", record.result)
            if job in ("download", "verify", "upload", "transfer"):
                assert (record.progress or {})["moved"] >= 1 << 20, job
        worker_site.submit("download", job_id="contract-failed", callback_url=receiver.url, **names, url=missing)
        worker_site.push("maintenance", envelope("contract-unknown", headers={"task": "ssvm.downlaod"}))
        ended = [worker_site.wait(f"contract-{name}", "failed") for name in ("failed", "unknown")]
        worker_site.until(lambda: len(receiver.got) == len(jobs) + 1, "all callbacks have arrived")
    for _, body in receiver.got:
        check_document("callback", json.loads(body))
    for record in ended:
        check_document("record", shown(record))
    with worker_site.broker.client() as client:
        entries = client.xrange(f"{worker_site.broker.prefix}ssvm.ledger:events")
    own = [fields for _, fields in entries if fields["job_id"].startswith("contract-")]
    assert len(own) >= 3 * len(jobs)
    for fields in own:
        check_document("event", fields)


def test_progress_of_a_silent_source(worker_site: Site, http_server: HttpServer) -> None:
    """The record counts all bytes that have arrived, also while the server is silent."""
    url = http_server.serve("silent", images.mbr(4 << 20), stall_after=3 << 20)
    names = {"account": "contract", "id": "203", "format": "raw"}
    job_id = worker_site.submit("download", job_id="contract-silent", url=url, **names)
    worker_site.until(
        lambda: (worker_site.ledger.get(job_id).progress or {}).get("bytes") == 3 << 20, "the bytes are counted"
    )
    worker_site.ledger.cancel(job_id, "the test")
    worker_site.wait(job_id, "cancelled")
