"""The registry of workers. Each worker sends a heartbeat every few seconds. A silent worker counts as down.

``<prefix>ssvm.workers`` is a hash of JSON by worker name. ``<prefix>ssvm.workers:seen`` is a sorted set of worker
names by the time of their last heartbeat, on the broker's clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .connection import BrokerClient, translated
from .record import from_json, iso

UP, DRAINING, DOWN = "Up", "Draining", "Down"
#: Heartbeats that may be missed before a worker counts as down.
_MISSED = 3
#: Seconds after which the registry forgets a silent worker.
_FORGET_S = 24 * 3600


@dataclass(frozen=True)
class WorkerInfo:
    """The description that a worker gives of itself."""

    #: Unique, as Celery and Flower show it.
    name: str
    host: str
    zone: str
    lanes: tuple[str, ...]
    #: Number of jobs that it can run at once.
    capacity: int
    version: str
    #: Seconds since the epoch, by its own clock.
    started: float
    #: Number of running jobs.
    active: int = 0
    draining: bool = False
    #: Whether it can receive messages. It may reach the ledger, but not RabbitMQ.
    connected: bool = True
    #: Stores that its host cannot use, by name: why, and since when.
    away: Mapping[str, str] = field(default_factory=dict)
    #: Seconds between two heartbeats.
    every_s: float = 5.0


@dataclass(frozen=True)
class WorkerStatus:
    """A worker and the time of its last heartbeat."""

    info: WorkerInfo
    #: Up | Draining | Down
    state: str
    #: Seconds since the epoch, by the broker's clock.
    seen: float

    def to_dict(self) -> dict[str, Any]:
        """Return the public JSON."""
        values = asdict(self.info)
        del values["draining"], values["every_s"]
        values |= {"lanes": list(self.info.lanes), "started": iso(self.info.started)}
        return {"worker": values.pop("name"), "state": self.state, **values, "seen": iso(self.seen)}


class WorkerRegistry(BrokerClient):
    """The workers of one broker. Every method raises StoreUnavailable while the broker is away."""

    _NAME = "ssvm.workers"
    _SCRIPTS = ("worker_beat",)

    def beat(self, info: WorkerInfo) -> None:
        """Store a heartbeat."""
        with translated(self._url):
            self._scripts["worker_beat"](args=[self._key, info.name, json.dumps(asdict(info)), _FORGET_S])

    def leave(self, name: str) -> None:
        """Remove a worker that has ended regularly."""
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.hdel(self._key, name)
            pipe.zrem(f"{self._key}:seen", name)
            pipe.execute()

    def workers(self, zone: str | None = None) -> list[WorkerStatus]:
        """Return all workers that sent a heartbeat within a day, by zone and name."""
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            pipe.hgetall(self._key)
            pipe.zrange(f"{self._key}:seen", 0, -1, withscores=True)
            pipe.time()
            described, seen, (now, _) = pipe.execute()
        found = [each for name, at in seen if (each := _status(described.get(name, ""), at, now))]
        in_zone = [each for each in found if zone in (None, each.info.zone)]
        return sorted(in_zone, key=lambda each: (each.info.zone, each.info.name))


def _status(text: str, seen: float, now: float) -> WorkerStatus | None:
    """Return the status, or None for an unreadable description, which must not hide the other workers."""
    info = from_json(WorkerInfo, text)
    if info is None:
        return None
    state = DRAINING if info.draining else UP
    # A heartbeat in the future is from before the clock jumped back. A running worker has sent a new one since.
    return WorkerStatus(info, DOWN if abs(now - seen) > _MISSED * info.every_s else state, seen)
