"""Answer health probes (``ssvm health`` and /readyz), and examine the image stores periodically.

A child process examines the stores. It may hang, and is then killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from typing import Any

from ssvm_worker.config.findings import suggestion
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import StoreUnavailable, WorkerError
from ssvm_worker.ledger.workers import DRAINING, UP, WorkerStatus
from ssvm_worker.wiring.assembly import open_registry

_LOG = logging.getLogger("ssvm.stores")
#: Seconds between two examinations, and for one of them.
_STORES_EVERY_S, _STORES_LIMIT_S = 60.0, 30.0
_FIELDS = {"name", "state"}


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


def similar_zone(settings: Settings, zone: str) -> str:
    """Return ``, did you mean X?`` if the zone has no workers and one with a similar name has; else an empty text."""
    with contextlib.suppress(WorkerError):
        zones = {settings.zone, *(each.info.zone for each in _workers(settings, None))}
        return "" if zone in zones else suggestion(zone, zones)
    return ""


def _workers(settings: Settings, zone: str | None) -> list[WorkerStatus]:
    with contextlib.closing(open_registry(settings)) as registry:
        return registry.workers(zone)


def look_at_stores(settings_file: str | None) -> list[dict[str, Any]]:
    """Return the rows of ``ssvm stores --json`` from a child process, which is killed if a store hangs.

    Raise StoreUnavailable without a result, for example if the process cannot start.
    """
    command = [sys.executable, "-P", "-m", "ssvm_worker", "stores", "--json"]
    command += ["--config", settings_file] if settings_file else []
    try:
        done = subprocess.run(command, capture_output=True, timeout=_STORES_LIMIT_S)
        rows = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise StoreUnavailable(f"The stores cannot be examined: {error}", "", "Run `ssvm stores`") from error
    if not isinstance(rows, list) or not all(isinstance(each, dict) and each.keys() >= _FIELDS for each in rows):
        raise StoreUnavailable("The stores cannot be examined", "", "Run `ssvm stores`")
    return rows


class StoreWatch:
    """A thread that examines the stores periodically, so that no scrape waits for them."""

    def __init__(self, settings_file: str | None) -> None:
        self._file = settings_file
        self._rows: list[dict[str, Any]] = []
        #: Time of the last examination with a result, in seconds since the epoch; 0 for none.
        self.looked = 0.0
        threading.Thread(target=self._repeat, name="stores", daemon=True).start()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the last examination; empty before the first one, and if it had no result."""
        return self._rows

    def _repeat(self) -> None:
        while True:
            try:
                self._rows = look_at_stores(self._file)
                self.looked = time.time()
            except Exception as error:  # noqa: BLE001 - the next examination may succeed, and the thread must not end
                self._rows = []
                _LOG.warning("%s: %s", type(error).__name__, error)
            time.sleep(_STORES_EVERY_S)
