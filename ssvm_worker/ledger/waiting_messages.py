"""Messages in Redis that no worker has taken: the lists ``ssvm.ZONE.LANE``."""

from __future__ import annotations

import re
from typing import Any

from ssvm_worker.artifacts.layout import ZONE
from ssvm_worker.config.schema import LANES

from .connection import BrokerClient, translated
from .record import queue_name

_QUEUE = re.compile(rf"ssvm\.({ZONE})\.({'|'.join(LANES)})")
#: The most messages that one call reads, and the keys that the broker examines in one step.
_BATCH, _STEP = 100, 1000


class WaitingMessages(BrokerClient):
    """The lists of one broker. Every method raises StoreUnavailable while the broker is away."""

    _NAME = ""

    def take_turn(self, every_s: float) -> bool:
        """Return True for one of all callers in *every_s* seconds."""
        with translated(self._url):
            return bool(self._redis.set(f"{self._key}ssvm.ledger:zones", "1", nx=True, px=round(every_s * 1000)))

    def queues(self) -> list[tuple[str, str]]:
        """Return zone and lane of each list. This reads the names of all keys."""
        with translated(self._url):
            names = list(self._redis.scan_iter(f"{self._key}ssvm.*", count=_STEP, _type="list"))
        found = (_QUEUE.fullmatch(name.removeprefix(self._key)) for name in names)
        return sorted((each[1], each[2]) for each in found if each)

    def oldest(self, zone: str, lane: str) -> list[str]:
        """Return at most 100 messages, the oldest first."""
        with translated(self._url):
            texts: Any = self._redis.lrange(f"{self._key}{queue_name(zone, lane)}", -_BATCH, -1)
        return list(reversed(texts))

    def remove(self, zone: str, lane: str, text: str) -> None:
        """Remove a message, unless a worker has taken it."""
        with translated(self._url):
            self._redis.lrem(f"{self._key}{queue_name(zone, lane)}", -1, text)
