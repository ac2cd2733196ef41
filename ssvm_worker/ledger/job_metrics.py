"""Counters of the ledger: jobs by state, age of the oldest queued job, slots, and the demand for workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .connection import BrokerClient, translated
from .record import number_of, place_of


@dataclass(frozen=True)
class LaneMetrics:
    """The jobs of one lane in one zone."""

    zone: str
    lane: str
    #: Number of jobs by state.
    counts: dict[str, int]
    #: Age of the oldest queued job, in seconds; 0 if no job is queued.
    oldest_s: float = 0.0


class JobMetrics(BrokerClient):
    """The counters of one broker. Every method raises StoreUnavailable while the broker is away."""

    _NAME = "ssvm.ledger:"
    _SCRIPTS = ("note_demand",)

    def lanes(self) -> list[LaneMetrics]:
        """Return every lane that has, or had, jobs, by zone and lane."""
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for name, number in self._counters("counts").items():
            state, zone, lane = place_of(name)
            counts.setdefault((zone, lane), {})[state] = number
        lanes = sorted(counts)
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            pipe.time()
            for zone, lane in lanes:
                pipe.zrange(f"{self._key}in:queued {zone} {lane}", 0, 0, withscores=True)
            (seconds, micros), *oldest = pipe.execute()
        now = seconds + micros / 1e6
        ages = [max([0.0, *(now - created for _, created in first)]) for first in oldest]
        return [LaneMetrics(*lane, counts[lane], age) for lane, age in zip(lanes, ages, strict=True)]

    def endings(self) -> dict[tuple[str, ...], int]:
        """Return the number of jobs that ever ended, by job, lane, zone, state and class of the error (or -)."""
        found: dict[tuple[str, ...], int] = {}
        for name, number in self._counters("endings").items():
            job, lane, *rest = name.split(" ", 2)
            # Older versions allowed zone names with blanks, so the zone is all that is left in the middle.
            parts = "".join(rest).rsplit(" ", 2)
            if len(parts) == 3:
                found[job, lane, parts[0], parts[1], parts[2]] = number
        return found

    def moved(self) -> dict[tuple[str, ...], int]:
        """Return the bytes that ended attempts have moved, by job and zone."""
        return {tuple(name.split(" ", 1)): number for name, number in self._counters("moved").items()}

    def slots(self) -> dict[str, int]:
        """Return the number of held slots of each shared limit."""
        prefix = self._key.removesuffix("ledger:") + "slots:"
        with translated(self._url):
            now, _ = self._redis.time()
            names = sorted(self._redis.scan_iter(match=f"{prefix}*", count=1000))
            pipe = self._redis.pipeline(transaction=False)
            for name in names:
                pipe.zcount(name, now, "+inf")
            return {name.removeprefix(prefix): count for name, count in zip(names, pipe.execute(), strict=True)}

    def callbacks(self) -> int:
        """Return the number of callbacks to deliver."""
        with translated(self._url):
            return int(self._redis.zcard(self._key + "callbacks"))

    def demand(self, zone: str, workers: int, window_s: float) -> int:
        """Store how many workers a zone needs now. Return the highest number of the last *window_s* seconds."""
        with translated(self._url):
            args = [f"{self._key}demand:{zone}", workers, window_s]
            return int(self._scripts["note_demand"](args=args))

    def _counters(self, name: str) -> dict[str, int]:
        with translated(self._url):
            values: Any = self._redis.hgetall(self._key + name)
        # A counter's name contains a blank. Other fields do not come from the ledger.
        numbers = {key: number_of(value) for key, value in values.items() if " " in key}
        return {key: number for key, number in numbers.items() if number is not None}
