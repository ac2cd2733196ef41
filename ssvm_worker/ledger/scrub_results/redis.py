"""``scrub_results.ScrubResults`` of one broker: the results of all workers.

<prefix>ssvm.verified:<store>          sorted set: prefixes of artifacts by the time of their last verification
<prefix>ssvm.findings                  hash: JSON by "<store> <place>", only for artifacts with findings
<prefix>ssvm.reached:<job>:<store>     string: the last artifact that the job has verified; expires
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ssvm_worker.ledger.connection import BrokerClient, translated

from . import ScrubResult

#: Seconds for which a stopped job may continue at the artifact that it reached.
_REACHED_S = 7 * 86400
#: Number of findings that are kept for one artifact. A damaged pack may affect thousands of places.
_MAX_FINDINGS = 50


class SharedScrubResults(BrokerClient):
    """The results that all workers share. Safe to share between threads. Connects at the first call."""

    _NAME = "ssvm."
    _SCRIPTS = ("scrub_note",)

    def note(self, store: str, place: str, findings: Sequence[str], job_id: str) -> None:
        keys = [self._verified(store), f"{self._key}findings", self._reached(job_id, store)]
        kept = json.dumps(list(findings[:_MAX_FINDINGS]))
        args = [place, f"{store} {place}", kept, json.dumps(job_id), len(findings), _REACHED_S]
        with translated(self._url):
            self._scripts["scrub_note"](keys, args)

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
            kept: Any = self._redis.hgetall(f"{self._key}findings")
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
            pipe.hdel(f"{self._key}findings", f"{store} {place}")
            pipe.execute()

    def noted(self, store: str, before: float) -> Iterator[str]:
        with translated(self._url):
            places: Any = self._redis.zrangebyscore(self._verified(store), "-inf", f"({before:.6f}")
        yield from places

    def _verified(self, store: str) -> str:
        return f"{self._key}verified:{store}"

    def _reached(self, job_id: str, store: str) -> str:
        return f"{self._key}reached:{job_id}:{store}"
