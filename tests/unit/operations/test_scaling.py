"""The number of workers: the rule, its inputs, and a simulated day."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from ssvm_worker.config import parse
from ssvm_worker.config.schema import ScalingSection
from ssvm_worker.errors import ConfigError
from ssvm_worker.ledger.job_metrics import JobMetrics
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from ssvm_worker.ledger.workers import WorkerInfo, WorkerRegistry
from ssvm_worker.operations.scaling import Running, decide, decisions, workers_needed
from tests import simulation
from tests.servers.broker import Broker

POLICY = ScalingSection(sessions=2, standby=2, min=1, max=10)
JOB = NewJob("j1", "download", "z", "download", {"url": "http://x/y"})


@pytest.mark.parametrize(("active", "queued", "workers"), [(0, 0, 1), (1, 0, 2), (2, 0, 2), (2, 3, 4), (100, 0, 10)])
def test_needed(active: int, queued: int, workers: int) -> None:
    """The need is running, waiting and standby jobs, divided by a worker's sessions, within the bounds."""
    assert workers_needed(POLICY, active, queued) == workers


def running(*active: int) -> list[Running]:
    """Return workers w0, w1, … with so many jobs, each younger than the previous one."""
    return [Running(f"w{number}", each, number) for number, each in enumerate(active)]


def test_only_idle_ones_go_the_youngest_first() -> None:
    """Only superfluous idle workers stop, the youngest first."""
    made = decide("z", (1, 0), running(0, 1, 0, 0, 0), POLICY, recent=2)
    assert (made.desired, made.removable) == (2, ("w4", "w3", "w2"))
    assert decide("z", (4, 0), running(1, 1, 1, 1), POLICY.model_copy(update={"standby": 0}), recent=2).removable == ()


def test_the_cool_down_keeps_what_there_is() -> None:
    """The cool-down keeps recently needed workers, but starts none."""
    kept = decide("z", (0, 0), running(0, 0, 0), POLICY, recent=8)
    assert (kept.desired, kept.removable) == (3, ())
    assert "cool-down" in kept.why
    assert decide("z", (0, 0), running(0, 0, 0), POLICY, recent=1).desired == 1


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """Return a ledger whose claims last until the test ends."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=100, keep_s=0) as found:
        yield found


def test_the_ledger_counts(ledger: Ledger, broker: Broker) -> None:
    """The ledger counts jobs by state, zone and lane, and keeps counters of endings and bytes."""
    counters = JobMetrics(broker.url, prefix=broker.prefix)
    for job_id, lane in (("a", "download"), ("b", "download"), ("c", "upload")):
        ledger.submit(replace(JOB, job_id=job_id, lane=lane))
    claims = [ledger.claim(each, "w") for each in ("a", "b")]
    assert all(claims)
    first, second = [each for each in claims if each]
    ledger.beat(first, {"bytes": 0, "moved": 7})
    ledger.finish(first, "succeeded", result={})
    ledger.finish(second, "failed", error={"error": "UnknownFormat"})
    download, upload = counters.lanes()
    assert {state: count for state, count in download.counts.items() if count} == {"succeeded": 1, "failed": 1}
    assert (upload.lane, upload.counts, upload.oldest_s > 0) == ("upload", {"queued": 1}, True)
    assert counters.endings() == {
        ("download", "download", "z", "succeeded", "-"): 1,
        ("download", "download", "z", "failed", "UnknownFormat"): 1,
    }
    assert counters.moved() == {("download", "z"): 7}
    ledger.expire()
    assert {state for state, count in counters.lanes()[0].counts.items() if count} == set()
    assert sum(counters.endings().values()) == 2


def test_decisions(ledger: Ledger, broker: Broker) -> None:
    """A zone's jobs and its workers that are up determine the decision; a draining worker does not count."""
    registry = WorkerRegistry(broker.url, prefix=broker.prefix)
    worker = WorkerInfo("w1", "host", "z", ("download",), 2, "1.0", started=1.0)
    registry.beat(worker)
    registry.beat(replace(worker, name="w2", draining=True))
    for job_id in ("a", "b", "c"):
        ledger.submit(replace(JOB, job_id=job_id))
    settings = parse(
        {"zone": "z", "broker": {"url": broker.url, "prefix": broker.prefix}, "scaling": {"standby": 1}}, "the test"
    )
    (made,) = decisions(settings)
    assert (made.queued, made.workers, made.desired, made.removable) == (3, 1, 2, ())


def test_wrong_bounds() -> None:
    """A minimum above the maximum is an error of the settings."""
    with pytest.raises(ConfigError, match="above max"):
        parse({"scaling": {"min": 5, "max": 2}}, "the test")


def test_a_day() -> None:
    """In a day of 10,000 jobs no busy worker stops, the bounds hold, and waits and costs are low."""
    days = simulation.compare()
    own, same_cost = days["ssvm scale"], next(day for name, day in days.items() if name.startswith("always 1"))
    assert own.broken_off == []
    assert len(own.waits) == simulation.JOBS
    assert simulation.POLICY.min <= min(own.workers) <= max(own.workers) <= simulation.POLICY.max
    assert own.wait(95) < same_cost.wait(95) / 5
    assert own.worker_hours < days["CloudStack's rule"].worker_hours
