"""The health of an export: its circuit breaker and the last probe. All processes of a host share it in one file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ssvm_worker.errors import StoreAway
from ssvm_worker.stores.ownership import give_to_owner

from .circuit_breaker import CLOSED, CircuitBreaker
from .probe import OK, ProbeResult


@dataclass(frozen=True)
class ExportHealth:
    """The known state of an export. The defaults mean: never probed."""

    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    #: The time of the last successful probe in seconds since the epoch, and the probe's results.
    looked: float = 0.0
    latency_s: float = 0.0
    usage: tuple[int, int, int] | None = None


class SharedExportHealth:
    """The file with the health of an export, and the rules to change it."""

    def __init__(self, path: Path, source: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._source = source
        self._clock = clock

    def read(self) -> ExportHealth:
        """Return the current health. A missing or damaged file has the default health."""
        try:
            values = json.loads(self._path.read_text())
            usage = tuple(values["usage"]) if values["usage"] else None
            return ExportHealth(CircuitBreaker(**values["breaker"]), values["looked"], values["latency_s"], usage)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return ExportHealth()

    def begin(self, limit_s: float) -> None:
        """Begin a try by this process. Raise StoreAway if another process tries, or the next try is not due."""
        with self._locked() as health:
            now = self._clock()
            if not health.breaker.allows(now):
                raise self.away(health)
            if health.breaker.state != CLOSED:
                self._write(replace(health, breaker=health.breaker.tried(now, limit_s)))

    def note(self, probed: ProbeResult) -> None:
        """Save the result of a probe."""
        if probed.state != OK:
            self.fail(probed.detail)
            return
        with self._locked() as health:
            self._write(ExportHealth(health.breaker.worked(), self._clock(), probed.latency_s, probed.usage))

    def fail(self, reason: str) -> None:
        """Open the breaker after a failed mount or probe."""
        with self._locked() as health:
            self._write(replace(health, breaker=health.breaker.failed(self._clock(), reason)))

    def away(self, health: ExportHealth | None = None) -> StoreAway:
        """Return the error for callers that want to use the export."""
        breaker = (health or self.read()).breaker
        since = time.strftime("%H:%M:%S UTC", time.gmtime(breaker.since))
        what = f"The store is away since {since}: {breaker.reason}"
        return StoreAway(what, self._source, "Check the server and the network; the job waits until the store answers")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[ExportHealth]:
        """Lock the file while the block runs. Yield the current health."""
        lock = self._path.with_suffix(".health-lock")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            give_to_owner(lock, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield self.read()
        finally:
            os.close(handle)

    def _write(self, health: ExportHealth) -> None:
        values = {**asdict(health), "usage": list(health.usage or ())}
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(values))
        give_to_owner(fresh)
        fresh.replace(self._path)
