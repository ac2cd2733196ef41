"""Decide how many workers a zone needs, and which of them may stop.

CloudStack starts one more system VM when the running ones cannot take the active commands and a standby capacity.
It calls these numbers secstorage.session.max and secstorage.capacity.standby (SecondaryStorageManagerImpl). They also
decide here. But this rule adds or removes several workers at once. It never names a worker with jobs.

``decide`` is a pure function. ``decisions`` reads its input from the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssvm_worker.config.schema import ScalingSection, Settings
from ssvm_worker.ledger.record import HELD, INBOUND
from ssvm_worker.ledger.workers import UP
from ssvm_worker.wiring.assembly import open_job_metrics, open_registry

if TYPE_CHECKING:
    from ssvm_worker.ledger.job_metrics import JobMetrics
    from ssvm_worker.ledger.workers import WorkerRegistry


def workers_needed(policy: ScalingSection, active: int, queued: int) -> int:
    """Return the number of workers for these running and queued jobs, within min and max. *policy* has sessions."""
    sessions = policy.sessions or 1
    return max(policy.min, min(policy.max, -(-(active + queued + policy.standby) // sessions)))


@dataclass(frozen=True)
class Running:
    """A worker that takes jobs."""

    name: str
    #: Number of running jobs.
    active: int
    #: Seconds since the epoch.
    started: float


@dataclass(frozen=True)
class Decision:
    """The decision about the workers of a zone."""

    zone: str
    active: int
    queued: int
    #: Number of workers that take jobs now.
    workers: int
    #: Number of workers that the zone needs.
    desired: int
    #: Idle workers that may be stopped, the youngest first; never more than the surplus.
    removable: tuple[str, ...]
    why: str

    def to_dict(self) -> dict[str, object]:
        """Return the public JSON."""
        return {**vars(self), "removable": list(self.removable)}


def decide(
    zone: str, load: tuple[int, int], workers: Sequence[Running], policy: ScalingSection, recent: int
) -> Decision:
    """Return the decision for a zone.

    *load*: the numbers of running and queued jobs. *recent*: the highest need of the cool-down time.
    """
    active, queued = load
    needed = workers_needed(policy, active, queued)
    desired = max(needed, min(recent, policy.max, max(len(workers), needed)))
    surplus = max(0, len(workers) - desired)
    idle = sorted((each for each in workers if not each.active), key=lambda each: -each.started)
    removable = tuple(each.name for each in idle[:surplus])
    why = f"{active} running + {queued} waiting + {policy.standby} standby, {policy.sessions} to a worker"
    if desired > needed:
        why += f"; {needed} would do, but more were needed within the cool-down"
    elif needed == policy.max:
        why += f"; {policy.max} at the most"
    elif needed == policy.min:
        why += f"; {policy.min} at the least"
    return Decision(zone, active, queued, len(workers), desired, removable, why)


def decisions(settings: Settings, zone: str | None = None) -> list[Decision]:
    """Return the decision for *zone*, or for this worker's zone and all that have workers or jobs.

    Each call stores the demand, because workers stop only after a time of lower demand. Call it every minute or so.
    """
    with closing(open_job_metrics(settings)) as counters, closing(open_registry(settings)) as registry:
        return decide_all(settings, counters, registry, zone)


def decide_all(
    settings: Settings, counters: JobMetrics, registry: WorkerRegistry, zone: str | None = None
) -> list[Decision]:
    """Return the same as ``decisions``, for a caller that keeps its connections."""
    known = registry.workers()
    load: dict[str, tuple[int, int]] = {}
    for lane in counters.lanes():
        if lane.lane in (INBOUND, HELD):  # these jobs wait for a client, or run inside other jobs
            continue
        active, queued = load.get(lane.zone, (0, 0))
        load[lane.zone] = active + lane.counts.get("running", 0), queued + lane.counts.get("queued", 0)
    given = settings.scaling
    policy = given.model_copy(update={"sessions": given.sessions or settings.worker.concurrency})
    # A zone whose jobs have all ended is not listed: its name may have been a typing error.
    busy = {name for name, numbers in load.items() if any(numbers)}
    found = []
    for name in [zone] if zone else sorted({*busy, *(worker.info.zone for worker in known), settings.zone}):
        now = load.get(name, (0, 0))
        recent = counters.demand(name, workers_needed(policy, *now), given.cool_down_s)
        up = [worker.info for worker in known if worker.info.zone == name and worker.state == UP]
        found.append(decide(name, now, [Running(w.name, w.active, w.started) for w in up], policy, recent))
    return found
