"""Messages that a server in any language may send, byte by byte in Celery's protocol 2."""

from __future__ import annotations

import json

import pytest

from tests.servers.http import HttpServer
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e

DATA = bytes(512) * 4096


def request(url: str, **fields: object) -> dict[str, object]:
    """Return a request for a download."""
    return {"url": url, "account": "1", "id": "t1", "format": "raw", **fields}


def test_same_message_five_times(site: Site, http_server: HttpServer) -> None:
    """Five copies of one message are one job that runs once."""
    url = http_server.serve("image.raw", DATA)
    for _ in range(5):
        site.send("download", request(url, job_id="mgmt-1"), task_id="any")
    site.start()
    record = site.wait("mgmt-1")
    site.until(lambda: site.waiting("download") == 0, "every copy is taken")
    site.start()
    assert (record.state, len(record.attempts), len(site.ledger.page())) == ("succeeded", 1, 1)
    assert len(http_server.requests) == 1


def test_without_job_id(site: Site, http_server: HttpServer) -> None:
    """A request without a job id gets the message's id."""
    site.start()
    site.send("download", request(http_server.serve("image.raw", DATA)), task_id="task-7")
    site.until(lambda: bool(site.ledger.page()), "the job is written down")
    assert site.wait("task-7").state == "succeeded"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([{"job_id": "j1", "url": "ftp://x/y", "acount": "1", "id": "t1"}], "did you mean account"),
        ([{"job_id": "j2", "url": "http://x/y", "account": "../1", "id": "t1"}], "account"),
        ([{"job_id": "../../etc", "url": "http://x/y", "account": "1", "id": "t1"}], "job_id"),
        (["http://x/y"], "one argument, the request object"),
        ([], "one argument, the request object"),
    ],
    ids=["unknown and missing fields", "a path trick", "an unsafe job id", "no object", "nothing"],
)
def test_invalid_request(worker_site: Site, args: list[object], says: str) -> None:
    """An invalid request is a failed job with the reason, under its own or the message's id."""
    site = worker_site
    task_id = f"m{abs(hash(json.dumps(args)))}"
    before = {each.job_id for each in site.ledger.page()}
    site.send_args("download", args, task_id)
    site.until(lambda: {each.job_id for each in site.ledger.page()} != before, "the job is written down")
    (record,) = [each for each in site.ledger.page() if each.job_id not in before]
    assert record.job_id in (task_id, "j1", "j2")
    assert record.state == "failed"
    assert record.error
    assert (record.error["error"], record.attempts) == ("InvalidRequest", ())
    assert says in record.error["message"]
