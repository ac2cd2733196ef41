"""Attempts at jobs, for tests: real doors, stores in memory, and what a worker would add."""

from __future__ import annotations

from typing import Any

from ssvm_worker import config
from ssvm_worker.errors import WorkerError
from ssvm_worker.jobs.attempt import Attempt, JobLimits
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.wiring.connections import ConfiguredConnections

SETTINGS: dict[str, Any] = {"download": {"allow_networks": ["127.0.0.0/8"]}}


def attempt(*stores: Store, job_id: str = "job-1", settings: dict[str, Any] | None = None, **given: Any) -> Attempt:
    """An attempt over *stores*, or over one store in memory named primary; loopback may be fetched from."""
    outside = ConfiguredConnections(config.parse(SETTINGS | (settings or {}), "test"))
    named = {store.name: store for store in stores or (MemoryStore("primary"),)}
    given.setdefault("limits", JobLimits(resumes=1, resume_delay_s=0.01))
    return Attempt(job_id, named, outside, **given)


def again(error: BaseException) -> bool:
    """What a worker answers when a further attempt will follow."""
    return isinstance(error, WorkerError) and error.retryable
