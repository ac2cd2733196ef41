"""The registry of workers on a real Valkey."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssvm_worker.ledger.workers import WorkerInfo, WorkerRegistry
from tests.servers.broker import Broker

WORKER = WorkerInfo("z-1@host", "host", "z", ("download", "upload"), 2, "1.0", started=1.0)


@pytest.fixture
def registry(broker: Broker) -> WorkerRegistry:
    """Return the workers of one broker."""
    return WorkerRegistry(broker.url, prefix=broker.prefix)


def test_a_worker_is_shown_as_it_describes_itself(registry: WorkerRegistry) -> None:
    """A worker is shown with its zone, lanes, capacity, version and current jobs."""
    registry.beat(replace(WORKER, active=1))
    (found,) = registry.workers()
    shown = found.to_dict()
    assert shown.pop("seen")
    assert shown == {
        "worker": "z-1@host",
        "state": "Up",
        "host": "host",
        "zone": "z",
        "lanes": ["download", "upload"],
        "capacity": 2,
        "version": "1.0",
        "started": "1970-01-01T00:00:01.000Z",
        "active": 1,
        "connected": True,
        "away": {},
    }


@pytest.mark.parametrize(
    ("changes", "state"), [({}, "Up"), ({"draining": True}, "Draining"), ({"every_s": -100.0}, "Down")]
)
def test_state(registry: WorkerRegistry, changes: dict[str, float], state: str) -> None:
    """A worker is Up, then Draining when it says so, and Down after three silent intervals."""
    registry.beat(replace(WORKER, **changes))  # type: ignore[arg-type]
    assert registry.workers()[0].state == state


def test_by_zone(registry: WorkerRegistry) -> None:
    """The list has the workers of one zone, or all by zone and name."""
    for name, zone in (("b", "z2"), ("c", "z1"), ("a", "z2")):
        registry.beat(replace(WORKER, name=name, zone=zone))
    assert [each.info.name for each in registry.workers()] == ["c", "a", "b"]
    assert [each.info.name for each in registry.workers("z2")] == ["a", "b"]


def test_one_that_leaves_is_gone(registry: WorkerRegistry) -> None:
    """A worker that ends normally is not shown as down."""
    registry.beat(WORKER)
    registry.leave(WORKER.name)
    assert registry.workers() == []


def test_clock_was_set_back(registry: WorkerRegistry, broker: Broker) -> None:
    """A dead worker does not stay up if the broker's clock was set back."""
    registry.beat(WORKER)
    with broker.client() as client:
        client.zincrby(f"{broker.prefix}ssvm.workers:seen", 3 * 3600, WORKER.name)
    assert registry.workers()[0].state == "Down"
