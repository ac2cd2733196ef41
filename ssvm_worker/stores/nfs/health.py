"""Whether an export answers, as the processes of this host share it in one file: its breaker and the last look."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssvm_worker.errors import StoreAway

from .circuit_breaker import CLOSED, CircuitBreaker
from .probe import OK, ProbeResult


@dataclass(frozen=True)
class ExportHealth:
    """What is known of an export; nothing yet when it was never looked at."""

    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    #: Seconds since the epoch of the last look that was answered, and what it found.
    looked: float = 0.0
    latency_s: float = 0.0
    usage: tuple[int, int, int] | None = None

    @classmethod
    def read(cls, path: Path) -> ExportHealth:
        """The file's; one that is not there, or half of it, says nothing."""
        try:
            values = json.loads(path.read_text())
            usage = tuple(values["usage"]) if values["usage"] else None
            return cls(CircuitBreaker(**values["breaker"]), values["looked"], values["latency_s"], usage)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return cls()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        breaker, usage = self.breaker.to_dict(), list(self.usage or ())
        return {"breaker": breaker, "looked": self.looked, "latency_s": self.latency_s, "usage": usage}


class SharedExportHealth:
    """The file, and its rules."""

    def __init__(self, path: Path, source: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._source = source
        self._clock = clock

    def read(self) -> ExportHealth:
        """As it is now."""
        return ExportHealth.read(self._path)

    def begin(self, limit_s: float) -> None:
        """This process tries it now; StoreAway if another does, or it is not due."""
        with self._changing() as health:
            now = self._clock()
            if not health.breaker.allows(now):
                raise self.away(health)
            if health.breaker.state != CLOSED:
                self._write(replace(health, breaker=health.breaker.tried(now, limit_s)))

    def note(self, probed: ProbeResult) -> None:
        """Keep what a look has found."""
        with self._changing() as health:
            if probed.state == OK:
                now = self._clock()
                self._write(ExportHealth(health.breaker.worked(), now, probed.latency_s, probed.usage))
            else:
                self._write(self._failed(health, probed.detail))

    def fail(self, reason: str) -> None:
        """It could not even be mounted."""
        with self._changing() as health:
            self._write(self._failed(health, reason))

    def away(self, health: ExportHealth | None = None) -> StoreAway:
        """The error for who wants to use it."""
        breaker = (health or self.read()).breaker
        since = time.strftime("%H:%M:%S UTC", time.gmtime(breaker.since))
        what = f"The store is away since {since}: {breaker.reason}"
        return StoreAway(what, self._source, "Look at the server and the network; the job waits until it answers")

    def _failed(self, health: ExportHealth, reason: str) -> ExportHealth:
        return replace(health, breaker=health.breaker.failed(self._clock(), reason))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[ExportHealth]:
        handle = os.open(self._path.with_suffix(".health-lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield self.read()
        finally:
            os.close(handle)

    def _write(self, health: ExportHealth) -> None:
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(health.to_dict()))
        fresh.replace(self._path)
