"""Slots that all workers of a broker share: who holds one renews it, and a dead worker's is free again in a moment.

``<prefix>ssvm.slots:<name>`` is a sorted set of holders by the time, on the broker's clock, at which they lose theirs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.ledger.connection import ALLOW_OOM, connect, translated

_log = logging.getLogger("ssvm.slots")

#: Seconds between two tries at a slot.
_AGAIN_S = 1.0
_PRELUDE = """
local key, holder = ARGV[1], ARGV[2]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local function take()
  redis.call('ZADD', key, string.format('%.6f', now + ARGV[3]), holder)
  redis.call('PEXPIRE', key, math.ceil(ARGV[3] * 1000))
  return 1
end
"""
#: ARGV: key, holder, seconds, limit -> 1, or 0 if all are held.
_TAKE = f"""{_PRELUDE}
redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.6f', now))
-- Nobody has one for an hour: the clock was set back. The living take theirs back.
redis.call('ZREMRANGEBYSCORE', key, string.format('%.6f', now + 3600), '+inf')
if redis.call('ZCARD', key) >= tonumber(ARGV[4]) then return 0 end
return take()
"""
#: ARGV: key, holder, seconds -> 1. One that was lost while the broker was away is taken back: the work goes on anyway.
_KEEP = f"{_PRELUDE} return take()"
#: ARGV: key, holder.
_GIVE = "return redis.call('ZREM', ARGV[1], ARGV[2])"


class SharedSlots:
    """``slots.Slots`` behind one broker; safe to share between threads, connects when a slot is first wanted.

    While the broker is away nobody gets a slot, and who has one keeps it. *claim_s*: seconds after which the slot of
    a worker that no longer renews it is free.
    """

    def __init__(self, url: str, *, prefix: str = "", claim_s: float = 10.0) -> None:
        self._url = url
        self._prefix = f"{prefix}ssvm.slots:"
        self._claim_s = claim_s

    @cached_property
    def _scripts(self) -> list[Any]:
        redis = connect(self._url)
        return [redis.register_script(each) for each in (ALLOW_OOM + _TAKE, ALLOW_OOM + _KEEP, _GIVE)]

    @contextmanager
    def hold(self, name: str, limit: int, wait: Callable[[float], None]) -> Iterator[None]:
        key, holder = self._prefix + name, uuid.uuid4().hex
        told = False
        while not self._tries(key, holder, limit):
            if not told:
                _log.info("waiting for a slot: %s has %d, and all are held, or the broker is away", name, limit)
            told = True
            wait(_AGAIN_S)
        stop = threading.Event()
        renewer = threading.Thread(target=self._renew, args=(key, holder, stop), name="slot", daemon=True)
        renewer.start()
        try:
            yield
        finally:
            stop.set()
            renewer.join()
            with contextlib.suppress(StoreUnavailable), translated(self._url):  # it expires by itself
                self._scripts[2](args=[key, holder])

    def _tries(self, key: str, holder: str, limit: int) -> bool:
        with contextlib.suppress(StoreUnavailable), translated(self._url):
            return bool(self._scripts[0](args=[key, holder, self._claim_s, limit]))
        return False

    def _renew(self, key: str, holder: str, stop: threading.Event) -> None:
        while not stop.wait(self._claim_s / 4):
            with contextlib.suppress(StoreUnavailable), translated(self._url):
                self._scripts[1](args=[key, holder, self._claim_s])
