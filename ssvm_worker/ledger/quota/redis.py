"""``quota.Quota`` behind one broker.

<prefix>ssvm.quota:used                hash: bytes by account
<prefix>ssvm.quota:sizes:<account>     hash: bytes by "<store> <place>", so that noting twice counts once
<prefix>ssvm.quota:held:<account>      hash: bytes by job
<prefix>ssvm.quota:until:<account>     sorted set: jobs by the time, on the broker's clock, when they lose theirs
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.ledger.connection import connect, translated

from . import AccountUsage, Grow

#: ARGV[1] is the key prefix, ARGV[2] the account.
_PRELUDE = """
local P, account = ARGV[1], ARGV[2]
local used, sizes = P .. 'used', P .. 'sizes:' .. account
local held, till = P .. 'held:' .. account, P .. 'until:' .. account
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local function whole(number) return string.format('%.0f', number) end
local function drop(from, to)
  for _, dead in ipairs(redis.call('ZRANGEBYSCORE', till, from, to)) do
    redis.call('ZREM', till, dead)
    redis.call('HDEL', held, dead)
  end
end
local function reserved(but)
  drop('-inf', string.format('%.6f', now))
  -- Nobody holds anything for an hour: the clock was set back. The living take theirs back.
  drop(string.format('%.6f', now + 3600), '+inf')
  local sum, all = 0, redis.call('HGETALL', held)
  for each = 1, #all, 2 do
    if all[each] ~= but then sum = sum + all[each + 1] end
  end
  return sum
end
"""
#: ARGV: job, bytes, limit, seconds -> 1 if they are held, used, held by others.
_HOLD = """
local others, has = reserved(ARGV[3]), tonumber(redis.call('HGET', used, account) or '0')
if has + others + ARGV[4] > tonumber(ARGV[5]) then return {0, whole(has), whole(others)} end
redis.call('HSET', held, ARGV[3], ARGV[4])
redis.call('ZADD', till, string.format('%.6f', now + ARGV[6]), ARGV[3])
return {1, whole(has), whole(others)}
"""
#: ARGV: job, bytes, seconds. What was lost while the broker was away is taken back: the work goes on anyway.
_KEEP = """
redis.call('HSETNX', held, ARGV[3], ARGV[4])
return redis.call('ZADD', till, string.format('%.6f', now + ARGV[5]), ARGV[3])
"""
#: ARGV: job.
_GIVE = """
redis.call('ZREM', till, ARGV[3])
return redis.call('HDEL', held, ARGV[3])
"""
#: ARGV: field, bytes or '' for gone, job.
_NOTE = """
local was = tonumber(redis.call('HGET', sizes, ARGV[3]) or '0')
if ARGV[4] == '' then redis.call('HDEL', sizes, ARGV[3]) else redis.call('HSET', sizes, ARGV[3], ARGV[4]) end
local added = (tonumber(ARGV[4]) or 0) - was
redis.call('HINCRBY', used, account, whole(added))
local mine = tonumber(redis.call('HGET', held, ARGV[5]) or '0')
if mine > 0 then redis.call('HSET', held, ARGV[5], whole(math.max(0, mine - added))) end
return 1
"""
#: -> used, held.
_LOOK = """
return {redis.call('HGET', used, account) or '0', whole(reserved(''))}
"""


class SharedQuota:
    """Safe to share between threads. *claim_s*: seconds after which what a dead worker holds is free."""

    def __init__(self, url: str, *, prefix: str = "", claim_s: float = 10.0) -> None:
        self._url = url
        self._prefix = f"{prefix}ssvm.quota:"
        self._claim_s = claim_s
        self._redis = connect(url)
        bodies = {"hold": _HOLD, "keep": _KEEP, "give": _GIVE, "note": _NOTE, "look": _LOOK}
        self._scripts = {name: self._redis.register_script(_PRELUDE + body) for name, body in bodies.items()}

    @contextmanager
    def hold(self, account: str, job_id: str, limit: int) -> Iterator[Grow]:
        held = [0]

        def grow(size: int) -> None:
            ok, used, others = self._run("hold", account, job_id, size, limit, self._claim_s)
            if not int(ok):
                raise AccountUsage(account, int(used), int(others)).refusal(size, limit)
            held[0] = size

        stop = threading.Event()
        args = (account, job_id, held, stop)
        renewer = threading.Thread(target=self._renew, args=args, name="quota", daemon=True)
        renewer.start()
        try:
            yield grow
        finally:
            stop.set()
            renewer.join()
            with contextlib.suppress(StoreUnavailable):  # it expires by itself
                self._run("give", account, job_id)

    def _renew(self, account: str, job_id: str, held: list[int], stop: threading.Event) -> None:
        while not stop.wait(self._claim_s / 4):
            with contextlib.suppress(StoreUnavailable):
                if held[0]:
                    self._run("keep", account, job_id, held[0], self._claim_s)

    def note(self, account: str, store: str, place: str, size: int, job_id: str = "") -> None:
        self._run("note", account, f"{store} {place}", size, job_id)

    def forget(self, account: str, store: str, place: str) -> None:
        self._run("note", account, f"{store} {place}", "", "")

    def usage(self) -> Iterator[AccountUsage]:
        with translated(self._url):
            names: Any = self._redis.hkeys(f"{self._prefix}used")
            held = self._redis.scan_iter(match=f"{self._prefix}held:*", count=1000)
            names = {*names, *(each.removeprefix(f"{self._prefix}held:") for each in held)}
        for account in sorted(names):
            used, others = self._run("look", account)
            yield AccountUsage(account, int(used), int(others))

    def places(self, store: str) -> Iterator[tuple[str, str]]:
        with translated(self._url):
            accounts: Any = sorted(self._redis.hkeys(f"{self._prefix}used"))
            for account in accounts:
                for name, _ in self._redis.hscan_iter(f"{self._prefix}sizes:{account}", count=1000):
                    where, _, place = name.partition(" ")
                    if where == store:
                        yield account, place

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _run(self, name: str, *args: object) -> Any:
        with translated(self._url):
            return self._scripts[name](args=[self._prefix, *map(str, args)])
