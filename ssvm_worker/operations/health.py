"""Whether jobs would be taken: what a probe asks, as ``ssvm health`` and as /readyz."""

from __future__ import annotations

import contextlib

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.workers import DRAINING, UP, WorkerStatus
from ssvm_worker.wiring.assembly import open_registry


def unready(settings: Settings, host: str | None = None) -> str:
    """Why no job would be taken in the zone, or on that host alone; empty if one would."""
    try:
        with contextlib.closing(open_registry(settings)) as registry:
            workers = registry.workers(settings.zone)
    except WorkerError as error:
        return str(error)
    there = [each for each in workers if host in (None, each.info.host)]
    if any(each.state == UP and each.info.connected for each in there):
        return ""
    found = ", ".join(f"{each.info.name} is {_state(each)}" for each in there) or "there is none"
    return f"No worker {f'on {host}' if host else f'of zone {settings.zone}'} is up: {found}"


def _state(seen: WorkerStatus) -> str:
    return seen.state if seen.info.connected else f"{seen.state}, but no message reaches it"


def dead(settings: Settings, host: str) -> str:
    """Why that host's worker should be started anew; empty while it says that it lives.

    A broker that is away is no reason: it would be away for the next worker too.
    """
    try:
        with contextlib.closing(open_registry(settings)) as registry:
            workers = registry.workers(settings.zone)
    except WorkerError:
        return ""
    if any(each.info.host == host and each.state in (UP, DRAINING) for each in workers):
        return ""
    return f"No worker on {host} says that it lives"


def idle(settings: Settings, zone: str, lane: str) -> str:
    """Return why no worker takes a job of that lane now; empty if one does, or if this is unknown."""
    try:
        with contextlib.closing(open_registry(settings)) as registry:
            workers = registry.workers(zone)
    except WorkerError:
        return ""
    up = [each.info for each in workers if each.state == UP and each.info.connected]
    if not up:
        return f"no worker of zone {zone} is up"
    if not any(lane in each.lanes for each in up):
        return f"no worker of zone {zone} takes lane {lane}"
    return ""
