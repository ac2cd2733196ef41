"""Puts the figures of the ledger before the rule of scaling: what each zone needs now."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.record import HELD, INBOUND
from ssvm_worker.ledger.workers import UP
from ssvm_worker.wiring.assembly import open_figures, open_registry

from .scaling import Decision, Policy, Running, decide

if TYPE_CHECKING:
    from ssvm_worker.ledger.job_metrics import JobMetrics
    from ssvm_worker.ledger.workers import WorkerRegistry


def decisions(settings: Settings, zone: str | None = None) -> list[Decision]:
    """What to do in that zone, else in all that have workers or jobs, and ours.

    Each call notes the demand, since workers go only after a time of lower demand: ask every minute or so.
    """
    with closing(open_figures(settings)) as figures, closing(open_registry(settings)) as registry:
        return decide_all(settings, figures, registry, zone)


def decide_all(
    settings: Settings, figures: JobMetrics, registry: WorkerRegistry, zone: str | None = None
) -> list[Decision]:
    """As ``decisions``, for a caller that stays connected."""
    seen = registry.workers()
    load: dict[str, tuple[int, int]] = {}
    for lane in figures.lanes():
        if lane.lane in (INBOUND, HELD):  # no worker is wanted for what waits for its sender, or runs within a job
            continue
        active, queued = load.get(lane.zone, (0, 0))
        load[lane.zone] = active + lane.counts.get("running", 0), queued + lane.counts.get("queued", 0)
    given = settings.scaling
    policy = Policy(given.sessions or settings.worker.concurrency, given.standby, given.min, given.max)
    # A zone whose jobs have all ended is wanted no more: it may have been a typing error.
    busy = {each for each, counts in load.items() if any(counts)}
    found = []
    for each in [zone] if zone else sorted({*busy, *(worker.info.zone for worker in seen), settings.zone}):
        now = load.get(each, (0, 0))
        recent = figures.demand(each, policy.needed(*now), given.cool_down_s)
        up = [worker.info for worker in seen if worker.info.zone == each and worker.state == UP]
        found.append(decide(each, now, [Running(w.name, w.active, w.started) for w in up], policy, recent))
    return found
