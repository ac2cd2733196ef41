"""What the ledger counts while it works: how many jobs there are and were, what waits for how long, what was wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .connection import connect, translated
from .record import place_of

#: ARGV: key, demand, seconds that it counts -> the highest demand of that time.
_NOTE = """
local now = redis.call('TIME')[1] + 0
redis.call('ZADD', ARGV[1], now, now .. ':' .. ARGV[2])
redis.call('ZREMRANGEBYSCORE', ARGV[1], '-inf', now - ARGV[3])
redis.call('EXPIRE', ARGV[1], math.ceil(ARGV[3]))
local most = 0
for _, each in ipairs(redis.call('ZRANGE', ARGV[1], 0, -1)) do
  most = math.max(most, tonumber(string.match(each, ':(%d+)$')))
end
return most
"""


@dataclass(frozen=True)
class LaneMetrics:
    """The jobs of one lane in one zone."""

    zone: str
    lane: str
    #: How many are in each state.
    counts: dict[str, int]
    #: Seconds since the oldest of those that wait was submitted; 0 if none waits.
    oldest_s: float = 0.0


class JobMetrics:
    """The figures behind one broker. Every method raises StoreUnavailable while the broker is away."""

    def __init__(self, url: str, *, prefix: str = "") -> None:
        self._url = url
        self._prefix = f"{prefix}ssvm.ledger:"
        self._redis = connect(url)
        self._note = self._redis.register_script(_NOTE)

    def lanes(self) -> list[LaneMetrics]:
        """Every lane that has, or had, jobs; by zone and lane."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        for name, number in self._hash("counts").items():
            state, zone, lane = place_of(name)
            found.setdefault((zone, lane), {})[state] = number
        oldest = self._oldest(sorted(found))
        return [LaneMetrics(*each, found[each], oldest_s) for each, oldest_s in oldest.items()]

    def endings(self) -> dict[tuple[str, ...], int]:
        """How many jobs ever ended, by job, lane, zone, state and class of the error (or -)."""
        found: dict[tuple[str, ...], int] = {}
        for name, number in self._hash("endings").items():
            job, lane, *rest = name.split(" ", 2)
            # The zone is in the middle: an older version took blanks in its name.
            zone, state, error = "".join(rest).rsplit(" ", 2)
            found[job, lane, zone, state, error] = number
        return found

    def moved(self) -> dict[tuple[str, ...], int]:
        """Bytes that ended jobs have moved, by job and zone."""
        return {tuple(name.split(" ", 1)): number for name, number in self._hash("moved").items()}

    def slots(self) -> dict[str, int]:
        """How many slots of each shared limit are held now."""
        prefix = self._prefix.removesuffix("ledger:") + "slots:"
        with translated(self._url):
            now, _ = self._redis.time()
            names = sorted(self._redis.scan_iter(match=f"{prefix}*", count=1000))
            pipe = self._redis.pipeline(transaction=False)
            for name in names:
                pipe.zcount(name, now, "+inf")
            return {name.removeprefix(prefix): count for name, count in zip(names, pipe.execute(), strict=True)}

    def callbacks(self) -> int:
        """How many jobs have ended whose callback is still to be delivered."""
        with translated(self._url):
            return int(self._redis.zcard(self._prefix + "callbacks"))

    def demand(self, zone: str, workers: int, window_s: float) -> int:
        """Note how many workers a zone needs now; returns the most that it needed within *window_s*."""
        with translated(self._url):
            return int(self._note(args=[f"{self._prefix}demand:{zone}", workers, window_s]))

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _hash(self, name: str) -> dict[str, int]:
        with translated(self._url):
            values: Any = self._redis.hgetall(self._prefix + name)
        # A counter's name has at least one blank; what somebody else has put there is none of ours.
        return {key: int(value) for key, value in values.items() if " " in key}

    def _oldest(self, lanes: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            pipe.time()
            for zone, lane in lanes:
                pipe.zrange(f"{self._prefix}in:queued {zone} {lane}", 0, 0, withscores=True)
            (seconds, micros), *firsts = pipe.execute()
        now = seconds + micros / 1e6
        ages = [max([now - created for _, created in first], default=0.0) for first in firsts]
        return {lane: max(0.0, age) for lane, age in zip(lanes, ages, strict=True)}
