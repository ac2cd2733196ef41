"""A full broker, under maxmemory and noeviction: its jobs can be shown, ended and removed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from ssvm_worker.ledger.workers import WorkerInfo, WorkerRegistry
from tests.servers.broker import Broker, StoppableBroker


@pytest.fixture
def full(stoppable_broker: StoppableBroker) -> Iterator[tuple[Broker, Ledger]]:
    """Return a full broker with waiting, running and ended jobs."""
    broker = stoppable_broker.with_prefix("")
    with Ledger(broker.url, keep_s=0.0) as ledger:
        for number in range(30):
            ledger.submit(NewJob(f"old-{number}", "delete", "z", "maintenance", {}))
            ledger.cancel(f"old-{number}", "ann")
        for job_id in ("runs", "waits"):
            ledger.submit(NewJob(job_id, "delete", "z", "download", {}))
        with broker.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1mb")
        yield broker, ledger


def test_new_jobs_are_refused(full: tuple[Broker, Ledger]) -> None:
    """A job that does not fit is refused, and leaves no key."""
    _, ledger = full
    with pytest.raises(StoreUnavailable, match="maxmemory"):
        ledger.submit(NewJob("new", "delete", "z", "maintenance", {}))
    assert "new" not in {each.job_id for each in ledger.page(limit=100)}


def test_what_is_there(full: tuple[Broker, Ledger]) -> None:
    """Jobs are listed, run, ended and cancelled, workers are shown, and old records expire with their counts."""
    broker, ledger = full
    assert len(ledger.page(limit=100)) == 32
    assert ledger.get("runs").state == "queued"
    claim = ledger.claim("runs", "w")
    assert claim
    assert ledger.beat(claim) is False
    ledger.finish(claim, "succeeded", result={})
    assert ledger.cancel("waits", "ann").state == "cancelled"
    assert ledger.reap(0.1, 5) == []
    registry = WorkerRegistry(broker.url)
    registry.beat(WorkerInfo("w", "h", "z", ("download",), 1, "1", 0.0))
    assert [each.info.name for each in registry.workers()] == ["w"]
    registry.close()
    assert ledger.expire() == 32
    assert ledger.page(limit=100) == []
    assert set(ledger.counts().values()) == {0}
