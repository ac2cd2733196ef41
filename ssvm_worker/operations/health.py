"""Answer health probes: ``ssvm health`` and /readyz."""

from __future__ import annotations

import contextlib

from ssvm_worker.config.findings import suggestion
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.workers import DRAINING, UP, WorkerStatus
from ssvm_worker.wiring.assembly import open_registry


def unready(settings: Settings, host: str | None = None) -> str:
    """Return why no worker of the zone, or of that host, would take a job; empty if one would."""
    try:
        workers = _workers(settings, settings.zone)
    except WorkerError as error:
        return str(error)
    candidates = [each for each in workers if host in (None, each.info.host)]
    if any(each.state == UP and each.info.connected for each in candidates):
        return ""
    states = (each.state + ("" if each.info.connected else ", but it receives no messages") for each in candidates)
    found = ", ".join(f"{each.info.name} is {state}" for each, state in zip(candidates, states, strict=True))
    place = f"on {host}" if host else f"of zone {settings.zone}"
    return f"No worker {place} is up: {found or 'there is none'}"


def dead(settings: Settings, host: str) -> str:
    """Return why that host's worker should be restarted; empty if its heartbeat arrives.

    A broker that is away is no reason, because it would also be away for a new worker.
    """
    try:
        workers = _workers(settings, settings.zone)
    except WorkerError:
        return ""
    if any(each.info.host == host and each.state in (UP, DRAINING) for each in workers):
        return ""
    return f"No worker on {host} sends a heartbeat"


def idle(settings: Settings, zone: str, lane: str) -> str:
    """Return why no worker takes a job of that lane now; empty if one does, or if this is unknown."""
    try:
        workers = _workers(settings, None)
    except WorkerError:
        return ""
    zones = {each.info.zone for each in workers}
    up = [each.info for each in workers if each.info.zone == zone and each.state == UP and each.info.connected]
    if not up:
        return f"no worker of zone {zone} is up{'' if zone in zones else suggestion(zone, zones)}"
    if not any(lane in each.lanes for each in up):
        return f"no worker of zone {zone} takes lane {lane}"
    return ""


def _workers(settings: Settings, zone: str | None) -> list[WorkerStatus]:
    with contextlib.closing(open_registry(settings)) as registry:
        return registry.workers(zone)
