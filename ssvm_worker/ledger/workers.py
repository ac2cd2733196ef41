"""Which workers there are: each says so every few seconds, and whoever has not for a while is down.

``<prefix>ssvm.workers`` is a hash of JSON by worker name, ``<prefix>ssvm.workers:seen`` their last signs of life, on
the broker's clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .connection import ALLOW_OOM, connect, translated
from .record import iso

UP, DRAINING, DOWN = "Up", "Draining", "Down"
#: Signs of life that may be missed before a worker counts as down.
_MISSED = 3
#: Seconds after its last sign of life until a worker that is down is forgotten.
_FORGET_S = 24 * 3600

#: ARGV: key, name, JSON, seconds to forget.
_BEAT = """
local key, seen = ARGV[1], ARGV[1] .. ':seen'
local now = redis.call('TIME')[1] + 0
redis.call('HSET', key, ARGV[2], ARGV[3])
redis.call('ZADD', seen, now, ARGV[2])
for _, each in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', now - ARGV[4])) do
  redis.call('ZREM', seen, each)
  redis.call('HDEL', key, each)
end
return 1
"""


@dataclass(frozen=True)
class WorkerInfo:
    """One worker, as it describes itself."""

    #: Unique, as Celery and Flower show it.
    name: str
    host: str
    zone: str
    lanes: tuple[str, ...]
    #: Jobs at once.
    capacity: int
    version: str
    #: Seconds since the epoch, by its own clock.
    started: float
    #: Jobs that it runs now.
    active: int = 0
    draining: bool = False
    #: Whether messages reach it: it may see the ledger, and not RabbitMQ.
    connected: bool = True
    #: Why and since when its host cannot use stores, by name.
    away: Mapping[str, str] = field(default_factory=dict)
    #: Seconds between two signs of life.
    every_s: float = 5.0


_FIELDS = {each.name for each in fields(WorkerInfo)}


@dataclass(frozen=True)
class WorkerStatus:
    """A worker, and when it was last heard of."""

    info: WorkerInfo
    #: Up | Draining | Down
    state: str
    #: Seconds since the epoch, by the broker's clock.
    seen: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON shape."""
        values = asdict(self.info)
        del values["draining"], values["every_s"]
        values |= {"lanes": list(self.info.lanes), "started": iso(self.info.started)}
        return {"worker": values.pop("name"), "state": self.state, **values, "seen": iso(self.seen)}


class WorkerRegistry:
    """The workers behind one broker. Every method raises StoreUnavailable while the broker is away."""

    def __init__(self, url: str, *, prefix: str = "") -> None:
        self._url = url
        self._key = f"{prefix}ssvm.workers"
        self._redis = connect(url)
        self._beat = self._redis.register_script(ALLOW_OOM + _BEAT)

    def beat(self, info: WorkerInfo) -> None:
        """A sign of life."""
        with translated(self._url):
            self._beat(args=[self._key, info.name, json.dumps(asdict(info)), _FORGET_S])

    def leave(self, name: str) -> None:
        """A worker has ended in good order; nobody needs to wonder where it is."""
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.hdel(self._key, name)
            pipe.zrem(f"{self._key}:seen", name)
            pipe.execute()

    def workers(self, zone: str | None = None) -> list[WorkerStatus]:
        """All that were heard of within a day, by zone and name."""
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            pipe.hgetall(self._key)
            pipe.zrange(f"{self._key}:seen", 0, -1, withscores=True)
            pipe.time()
            described, seen, (now, _) = pipe.execute()
        found = [each for name, when in seen if (each := _seen(described.get(name, ""), when, now))]
        return sorted((each for each in found if zone in (None, each.info.zone)), key=lambda each: _order(each.info))

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


def _seen(text: str, when: float, now: float) -> WorkerStatus | None:
    """None for what cannot be read, as it must not hide the others."""
    try:
        values = json.loads(text)
        known = {name: value for name, value in values.items() if name in _FIELDS}  # a newer one may say more
        info = WorkerInfo(**known | {"lanes": tuple(values["lanes"])})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    state = DRAINING if info.draining else UP
    # A sign of life that is still to come is of a time before the clock was set back; the living have given another.
    return WorkerStatus(info, DOWN if abs(now - when) > _MISSED * info.every_s else state, when)


def _order(info: WorkerInfo) -> tuple[str, str]:
    return info.zone, info.name
