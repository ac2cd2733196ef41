"""Puts the figures of the ledger before the rule of scaling: what each zone needs now."""

from __future__ import annotations

from .assembly import open_figures, open_registry
from .ledger.record import HELD, INBOUND
from .ledger.registry import UP
from .scaling import Decision, Policy, Running, decide
from .settings import Settings


def decisions(settings: Settings, zone: str | None = None) -> list[Decision]:
    """What to do in that zone, else in all that have workers or jobs, and ours.

    Each call notes the demand, since workers go only after a time of lower demand: ask every minute or so.
    """
    figures = open_figures(settings)
    workers = [each for each in open_registry(settings).workers() if each.state == UP]
    load: dict[str, tuple[int, int]] = {}
    for lane in figures.lanes():
        if lane.lane in (INBOUND, HELD):  # no worker is wanted for what waits for its sender, or runs within a job
            continue
        active, queued = load.get(lane.zone, (0, 0))
        load[lane.zone] = active + lane.counts.get("running", 0), queued + lane.counts.get("queued", 0)
    given = settings.scaling
    policy = Policy(given.sessions or settings.worker.concurrency, given.standby, given.min, given.max)
    found = []
    for each in [zone] if zone else sorted({*load, *(seen.info.zone for seen in workers), settings.zone}):
        now = load.get(each, (0, 0))
        recent = figures.demand(each, policy.needed(*now), given.cool_down_s)
        those = [Running(w.info.name, w.info.active, w.info.started) for w in workers if w.info.zone == each]
        found.append(decide(each, now, those, policy, recent))
    return found
