"""Real workers: the message of one account's job may run another's, and Celery's task names the job that runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.servers.http import HttpServer
from tests.servers.worker import Site
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e

DATA = bytes(512) * 4096


def queued(site: Site, http_server: HttpServer, name: str, account: str, priority: int = 0) -> str:
    """Return a waiting download."""
    url = http_server.serve(f"{name}.raw", DATA)
    return site.submit(
        "download", url=url, account=account, id=name, format="raw", job_id=f"job-{name}", priority=priority
    )


def test_order_of_a_worker(site: Site, http_server: HttpServer) -> None:
    """A worker runs the urgent job first, then accounts in turn, for any order of the messages."""
    ids = [queued(site, http_server, f"a{number}", "a") for number in range(4)]
    ids += [queued(site, http_server, "b0", "b"), queued(site, http_server, "urgent", "a", priority=5)]
    worker = site.start()
    records = sorted((site.wait(each) for each in ids), key=lambda record: record.attempts[0].started)
    assert [each.state for each in records] == ["succeeded"] * 6
    assert [each.job_id.removeprefix("job-") for each in records] == ["urgent", "b0", "a0", "a1", "a2", "a3"]
    for each in ids:  # each has its own task, and ends under its own name; Celery reports this after the job has ended
        site.until(lambda job=each: f"'job_id': '{job}', 'state': 'succeeded'" in worker.log.read_text(), "it is said")
        assert f"Task ssvm.download[{each}] received" in worker.log.read_text()


def test_attempts_tell_where_and_how_much(site: Site, http_server: HttpServer) -> None:
    """The history of a job has each attempt's worker, as `ssvm workers` shows it, host and bytes."""
    site.start()
    (attempt,) = site.wait(queued(site, http_server, "t", "a")).to_dict()["attempts"]
    assert attempt["worker"].startswith("z-")
    assert attempt["worker"].endswith(f"@{attempt['host']}")
    assert attempt["bytes"] >= len(DATA)


def test_limit_among_workers(make_site: Callable[..., Site], http_server: HttpServer) -> None:
    """With a limit of one, two workers run one job of an account at a time, and others meanwhile."""
    site = make_site(limits={"per_account": 1})
    for _ in range(2):
        site.start()
    slow = http_server.serve("slow.raw", DATA, stall_after=1000)
    first = site.submit("download", url=slow, account="a", id="slow", format="raw")
    assert http_server.stalled.wait(PATIENCE_S)
    second = queued(site, http_server, "a1", "a")
    other = queued(site, http_server, "b1", "b")
    assert site.wait(other).state == "succeeded"
    site.until(lambda: site.ledger.get(second).waits_for == "account:a", "the second job waits")
    site.ledger.cancel(first, "ann")
    assert site.wait(second).state == "succeeded"
    assert len(site.ledger.get(second).attempts) == 1
