"""Attempts at jobs, for tests: real connections, stores in memory, and the functions of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssvm_worker import config
from ssvm_worker.errors import WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.services import JobServices
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.wiring.connections import ConfiguredConnections

SETTINGS: dict[str, Any] = {"download": {"allow_networks": ["127.0.0.0/8"], "resumes": 1}}
SERVICES = ("slots", "jobs", "scrub_results", "quota", "open_snapshots")


def attempt(*stores: Store, settings: dict[str, Any] | None = None, **given: Any) -> Attempt:
    """Return an attempt with *stores*, or with one store in memory named primary. Downloads from loopback are allowed.

    *settings* are tables that extend those of SETTINGS. *given* are fields of the attempt, or its services.
    """
    given_tables = settings or {}
    download = SETTINGS["download"] | given_tables.get("download", {})
    parsed = config.parse(given_tables | {"download": download}, "test")
    named = {store.name: store for store in stores or (MemoryStore("primary"),)}
    return attempt_with(ConfiguredConnections(parsed), named, settings=parsed, **given)


def attempt_with(connections: Any, stores: Mapping[str, Store], **given: Any) -> Attempt:
    """Return an attempt at job-1 with these connections. *given* are fields of the attempt, or its services."""
    services = JobServices(connections=connections)
    for name in SERVICES:
        if name in given:
            setattr(services, name, given.pop(name))
    fields = {"job_id": "job-1", "settings": config.parse(SETTINGS, "test"), "resume_delay_s": 0.01}
    return Attempt(stores=stores, services=services, **fields | given)


def again(error: BaseException) -> bool:
    """Return the answer of a worker if another attempt will follow."""
    return isinstance(error, WorkerError) and error.retryable
