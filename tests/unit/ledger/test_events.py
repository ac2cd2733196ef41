"""The stream of events on a real Valkey: every change once, in order, and none lost with its consumer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ssvm_worker.ledger import events as module
from ssvm_worker.ledger.events import Events
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from tests.servers.broker import Broker

JOB = NewJob("j1", "download", "z", "download", {"url": "http://x/y"})


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """Return a ledger whose claims last until the test ends."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=100) as found:
        yield found


@pytest.fixture
def events(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Events:
    """Return the stream of that ledger; a lost consumer's events are free again at once."""
    monkeypatch.setattr(module, "_ABANDONED_S", 0.0)
    return Events(broker.url, prefix=broker.prefix)


def run(ledger: Ledger, job_id: str = "j1") -> None:
    """Submit a job and run it: one attempt fails temporarily, one succeeds."""
    ledger.submit(replace(JOB, job_id=job_id))
    for error in ({"error": "StoreUnavailable"}, None):
        claim = ledger.claim(job_id, "w")
        assert claim
        if error:
            ledger.release(claim, error)
        else:
            ledger.finish(claim, "succeeded", result={"size": 5})


def test_every_change(ledger: Ledger, events: Events) -> None:
    """Each change of a job's state is one event, in order, the last with the outcome."""
    run(ledger)
    found = list(itertools.islice(events.read("billing", "a"), 5))
    assert [(each.state, each.attempt) for each in found] == [
        ("queued", 0),
        ("running", 1),
        ("queued", 1),
        ("running", 2),
        ("succeeded", 2),
    ]
    assert found[-1].ended
    assert found[-1].outcome == {"size": 5}
    assert (found[0].job_id, found[0].job, found[0].zone, found[0].lane) == ("j1", "download", "z", "download")


def test_the_error_of_a_failed_job(ledger: Ledger, events: Events) -> None:
    """A failed job's event shows its error."""
    ledger.submit(JOB)
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.finish(claim, "failed", error={"error": "UnknownFormat"})
    *_, last = itertools.islice(events.read("billing", "a"), 3)
    assert (last.state, last.outcome) == ("failed", {"error": "UnknownFormat"})


def test_a_group_shares(ledger: Ledger, events: Events) -> None:
    """In one group each event goes to one consumer, and another group receives all of them again."""
    run(ledger)
    first = events.read("billing", "a")
    # Consumer a has the last given event until it asks for more. It has taken the rest of its batch too.
    taken = [next(first).state for _ in range(2)]
    assert taken == ["queued", "running"]
    again = list(itertools.islice(events.read("audit", "a"), 5))
    assert len(again) == 5


def test_a_consumer_that_dies(ledger: Ledger, events: Events) -> None:
    """A lost consumer's unacknowledged events go to it after its return, or to another consumer of the group."""
    run(ledger)
    reading = events.read("billing", "a")
    assert [next(reading).attempt for _ in range(3)] == [0, 1, 1]
    reading.close()  # type: ignore[attr-defined]
    # Two events were acknowledged.
    assert next(events.read("billing", "a")).state == "queued"
    assert [each.attempt for each in itertools.islice(events.read("billing", "b"), 3)] == [1, 2, 2]


def test_waiting_makes_no_events(ledger: Ledger, events: Events) -> None:
    """A job that waits for a resource is queued repeatedly without an event."""
    for job_id in ("j1", "j2"):
        ledger.submit(replace(JOB, job_id=job_id, resource="template/tmpl/2/201"))
    assert ledger.claim("j1", "w")
    assert ledger.claim("j2", "w") is None
    found = list(itertools.islice(events.read("billing", "a"), 3))
    assert [(each.job_id, each.state) for each in found] == [("j1", "queued"), ("j2", "queued"), ("j1", "running")]


def test_entry_of_another_program(ledger: Ledger, events: Events, broker: Broker) -> None:
    """An entry that is no event is skipped, and the following events come."""
    with broker.client() as client:
        for fields in ({"junk": "x"}, {"job_id": b"\xff"}, {"job_id": "j", "attempt": "x", "outcome": "{"}):
            client.xadd(f"{broker.prefix}ssvm.ledger:events", fields)
    ledger.submit(JOB)
    assert next(events.read("billing", "a")).job_id == "j1"
