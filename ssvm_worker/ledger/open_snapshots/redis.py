"""``open_snapshots.OpenSnapshots`` of one broker.

<prefix>ssvm.snapshots                 hash: JSON by job
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ssvm_worker.ledger.connection import BrokerClient, translated

from . import OpenSnapshot


class SharedOpenSnapshots(BrokerClient):
    """The open snapshots of all workers. Safe to share between threads. Connects at the first call."""

    _NAME = "ssvm."

    def note(self, snapshot: OpenSnapshot) -> None:
        with translated(self._url):
            self._redis.hset(f"{self._key}snapshots", snapshot.job_id, json.dumps(asdict(snapshot)))

    def forget(self, job_id: str) -> None:
        with translated(self._url):
            self._redis.hdel(f"{self._key}snapshots", job_id)

    def all(self) -> Sequence[OpenSnapshot]:
        with translated(self._url):
            kept: Any = self._redis.hgetall(f"{self._key}snapshots")
        found = []
        for job_id, text in kept.items():
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # a damaged entry must not hide the others
                values = json.loads(text)
                created, needs = float(values["created"]), bool(values["needs_consolidation"])
                found.append(OpenSnapshot(job_id, str(values["vcenter"]), str(values["vm"]), created, needs))
        return sorted(found, key=lambda each: each.created)
