"""A copy job for each store that lacks an artifact: its id follows from the job's id, and it exists once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.jobs.store_set import find_placement
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob, Record
from ssvm_worker.runner.replication import order_copies
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.wiring.assembly import open_ledger
from tests.attempts import attempt
from tests.servers.broker import Broker

BACKUP = Artifact("backup", "acme", "b1", "vol1")


@pytest.fixture
def settings(broker: Broker) -> Settings:
    """Return settings of another zone than the job's."""
    return parse({"zone": "here", "broker": {"url": broker.url, "prefix": broker.prefix}}, "the test")


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    """Return a ledger for this test."""
    with open_ledger(settings) as found:
        yield found


def ended(ledger: Ledger, job_id: str = "j1") -> Record:
    """Return a job that is about to end."""
    return ledger.submit(NewJob(job_id, "download", "there", "download", {}))[0]


def owing(*names: str) -> dict[str, Any]:
    """Return the result of a job that left these stores without the artifact."""
    stores = {name: MemoryStore(name) for name in names}
    return find_placement(attempt(), stores, BACKUP) | {"stores": ["primary"]}


def test_ordered(settings: Settings, ledger: Ledger) -> None:
    """Each store that lacks the artifact gets a patient copy job in the job's zone, and the result names it."""
    result = owing("archive", "other")
    copies = order_copies(settings, ledger, ended(ledger), result)

    assert [each.job_id for each in copies] == ["j1.owed.archive", "j1.owed.other"]
    assert result["owed"]["archive"]["copy_job"] == "j1.owed.archive"
    asked = {"account": "acme", "id": "b1", "kind": "backup", "volume": "vol1", "stores": ["archive"], "patient": True}
    assert copies[0].request == asked | {"job_id": "j1.owed.archive"}
    assert (copies[0].zone, copies[0].lane, copies[0].resource) == ("there", "maintenance", BACKUP.resource)


def test_ordered_once(settings: Settings, ledger: Ledger) -> None:
    """A job that ends again, as after a lost answer of the broker, creates no second copy job."""
    record = ended(ledger)
    for _ in range(2):
        order_copies(settings, ledger, record, owing("archive"))
    assert len(ledger.page()) == 2


def test_nothing_owed(settings: Settings, ledger: Ledger) -> None:
    """A result without missing stores, or of a job that stores nothing, creates no copy job."""
    record = ended(ledger)
    assert order_copies(settings, ledger, record, {"stores": ["primary"], "owed": {}}) == []
    assert order_copies(settings, ledger, record, {"objects": 2}) == []


def test_long_names(settings: Settings, ledger: Ledger) -> None:
    """An id that would be too long or invalid is replaced by a derived id, always the same."""
    record = ended(ledger, "j" * 128)
    ids = {order_copies(settings, ledger, record, owing("Zürich 2"))[0].job_id for _ in range(2)}
    assert len(ids) == 1


def test_id_is_taken(settings: Settings, ledger: Ledger) -> None:
    """If another job has that id, the store stays owed, and the job is unchanged."""
    ended(ledger, "j1.owed.archive")
    result = owing("archive")
    assert order_copies(settings, ledger, ended(ledger), result) == []
    assert "copy_job" not in result["owed"]["archive"]
