"""``verdicts.Verdicts`` behind one broker: what scrubbing has found, for all workers.

<prefix>ssvm.verified:<store>          sorted set: places of artifacts by when they were last read
<prefix>ssvm.findings                  hash: JSON by "<store> <place>", of those that are not sound
<prefix>ssvm.reached:<job>:<store>     the last place that the job has read; expires
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ssvm_worker.ledger.connection import connect, translated

from . import ScrubResult

#: Seconds for which a job that stopped may go on where it was.
_REACHED_S = 7 * 86400
#: Findings of one artifact that are kept; a damaged pack may hit thousands of places.
_KEPT = 50

#: KEYS: verified, findings, reached. ARGV: place, field, findings as JSON, job, how many there are, seconds.
_NOTE = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
redis.call('ZADD', KEYS[1], string.format('%.6f', now), ARGV[1])
redis.call('SET', KEYS[3], ARGV[1], 'EX', ARGV[6])
if ARGV[5] == '0' then return redis.call('HDEL', KEYS[2], ARGV[2]) end
local value = '{"when":' .. string.format('%.6f', now) .. ',"job_id":' .. ARGV[4] .. ',"findings":' .. ARGV[3] .. '}'
return redis.call('HSET', KEYS[2], ARGV[2], value)
"""


class SharedScrubResults:
    """Safe to share between threads; connects when it is first asked."""

    def __init__(self, url: str, *, prefix: str = "") -> None:
        self._url = url
        self._prefix = f"{prefix}ssvm."
        self._redis = connect(url)
        self._note = self._redis.register_script(_NOTE)

    def note(self, store: str, place: str, findings: Sequence[str], job_id: str) -> None:
        keys = [self._verified(store), self._findings, self._reached(job_id, store)]
        kept = json.dumps(list(findings[:_KEPT]))
        with translated(self._url):
            self._note(keys, [place, f"{store} {place}", kept, json.dumps(job_id), len(findings), _REACHED_S])

    def reached(self, job_id: str, store: str) -> str:
        with translated(self._url):
            return str(self._redis.get(self._reached(job_id, store)) or "")

    def times(self, store: str, places: Sequence[str]) -> list[float]:
        if not places:
            return []
        with translated(self._url):
            found: Any = self._redis.zmscore(self._verified(store), list(places))
        return [float(each or 0) for each in found]

    def findings(self) -> Iterator[ScrubResult]:
        with translated(self._url):
            kept: Any = self._redis.hgetall(self._findings)
        for field in sorted(kept):
            store, _, place = field.partition(" ")
            try:
                values = json.loads(kept[field])
                yield ScrubResult(store, place, float(values["when"]), tuple(values["findings"]), str(values["job_id"]))
            except (ValueError, TypeError, KeyError, RecursionError):
                yield ScrubResult(store, place, 0.0, ("the finding cannot be read: verify the artifact again",), "")

    def forget(self, store: str, place: str) -> None:
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.zrem(self._verified(store), place)
            pipe.hdel(self._findings, f"{store} {place}")
            pipe.execute()

    def noted(self, store: str, before: float) -> Iterator[str]:
        with translated(self._url):
            places: Any = self._redis.zrangebyscore(self._verified(store), "-inf", f"({before:.6f}")
        yield from places

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _verified(self, store: str) -> str:
        return f"{self._prefix}verified:{store}"

    @property
    def _findings(self) -> str:
        return f"{self._prefix}findings"

    def _reached(self, job_id: str, store: str) -> str:
        return f"{self._prefix}reached:{job_id}:{store}"
