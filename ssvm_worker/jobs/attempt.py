"""The attempt: everything that a running job may use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import Cancelled, InvalidRequest, misused
from ssvm_worker.ledger.quota import UNLIMITED, Held
from ssvm_worker.streaming.interfaces import Check, Owner, Source, Store
from ssvm_worker.streaming.pipeline import Resuming

from .services import JobServices

#: The stage of an attempt that has not begun its first one.
NO_STAGE = "starting"


class Progress:
    """Progress of an attempt in bytes. Several threads may share it.

    *publish* gets the snapshot at the start and the end of each stage, and at most every *every_s* seconds between.
    What it got last is old while nothing moves. A reader that shows the progress calls ``snapshot`` itself.
    The sum of all ``advance`` calls is the number of moved bytes. It never decreases.
    """

    def __init__(self, publish: Callable[[dict[str, Any]], None] = lambda _: None, every_s: float = 0.5) -> None:
        self.bytes = 0
        #: Moved bytes of all stages.
        self.moved = 0
        self.total: int | None = None
        self.stage = NO_STAGE
        self._publish = publish
        self._every_s = every_s
        self._last = 0.0
        self._started = time.monotonic()
        self._stage_bytes = 0
        self._lock = threading.Lock()

    def start(self, stage: str, total: int | None = None, done: int = 0) -> None:
        """Begin a stage of *total* bytes, of which *done* bytes exist already."""
        if self.stage != NO_STAGE:
            self.publish()
        with self._lock:
            self.stage, self.total, self.bytes = stage, total, done
            self._stage_bytes, self._started = done, time.monotonic()
        self.publish()

    def advance(self, size: int) -> None:
        """Add *size* bytes."""
        with self._lock:
            self.bytes += size
            self.moved += size
            due = time.monotonic() - self._last >= self._every_s
        if due:
            self.publish()

    def skip(self, size: int) -> None:
        """Add *size* bytes to the stage that need no move. A negative size: a failed stream moves them again."""
        with self._lock:
            self.bytes += size

    def observe(self, chunk: bytes) -> None:
        """Add the size of a chunk, as an observer of the stream."""
        self.advance(len(chunk))

    def publish(self) -> None:
        """Publish the snapshot now."""
        self._last = time.monotonic()
        self._publish(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """Return the public JSON.

        ``stage``, ``bytes`` and ``total`` (or null) describe the stage. ``rate`` is its average in bytes per second.
        ``moved`` is the number of bytes that the whole attempt has moved.
        """
        elapsed = max(time.monotonic() - self._started, 1e-3)
        rate = round((self.bytes - self._stage_bytes) / elapsed)
        return {"stage": self.stage, "bytes": self.bytes, "total": self.total, "rate": rate, "moved": self.moved}


@dataclass(kw_only=True)
class JobContext:
    """One run of a job by one worker: its identity, its progress, and how it learns that it must stop."""

    job_id: str
    #: The number of the attempt, from 1.
    number: int = 1
    #: The fencing token of the claim.
    token: int = 0
    progress: Progress = field(default_factory=Progress)
    log: logging.LoggerAdapter[Any] | logging.Logger = field(default_factory=lambda: logging.getLogger("ssvm.job"))
    #: Returns why the attempt must stop (user | shutdown | deadline | fenced), or None. Cheap: called for every chunk.
    stop_reason: Callable[[], str | None] = lambda: None
    #: Raises Cancelled("fenced") if the claim is lost. Called right before each commit.
    confirm: Callable[[], None] = lambda: None
    #: Returns whether another attempt follows after that error. If so, the job keeps partial bytes.
    will_resume: Callable[[BaseException], bool] = lambda _: False

    @property
    def owner(self) -> Owner:
        """Return the writer of this attempt's uncommitted bytes on the stores."""
        return Owner(self.job_id, self.token)

    def check(self) -> None:
        """Raise Cancelled if this attempt must stop."""
        if reason := self.stop_reason():
            raise Cancelled(reason)

    def wait(self, seconds: float) -> None:
        """Sleep. Raise Cancelled within 0.25 s if the attempt must stop."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.25))
        self.check()


@runtime_checkable
class Checked(Protocol):
    """Stores that call a function regularly while they wait for a server."""

    def checked(self, check: Check) -> Mapping[str, Store]:
        """Return the same stores, opened again with that *check*."""


@dataclass(kw_only=True)
class Attempt(JobContext):
    """A job's context with all that the job may use: the image stores, the services, and the settings."""

    stores: Mapping[str, Store]
    services: JobServices
    settings: Settings
    #: The bytes that this job reserves of its account's quota. It observes every stream to a store.
    held: Held = UNLIMITED
    #: The vCenters that this attempt has logged in to. The copies for the clean-up share it.
    reached: set[str] = field(default_factory=set)
    #: Seconds before the first resumption of a stream. Each further resumption doubles them.
    resume_delay_s: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.stores, Checked):
            # The attempt of ``for_cleanup`` is a copy. It must not stop at the check of the first attempt.
            self.stores = self.stores.checked(self.check)

    def for_cleanup(self) -> Attempt:
        """Return a copy for the clean-up after this attempt.

        The copy ignores a cancellation. It still stops if the claim is lost.
        """

        def confirm() -> None:
            try:
                self.confirm()
            except Cancelled as error:
                if error.reason == "fenced":
                    raise

        return replace(self, confirm=confirm, stop_reason=lambda: None)

    def slot(self, name: str, limit: int) -> AbstractContextManager[None]:
        """Hold one of *limit* slots of that name while the block runs.

        Entering waits for a free slot, and raises Cancelled if the attempt must stop.
        """
        return self.services.slots.hold(name, limit, self.wait)

    def resuming(self, source: Source, offset: int = 0) -> Resuming:
        """Return the bytes of a source, resumed after failures as often as ``download.resumes`` allows."""
        tries = self.settings.download.resumes
        return Resuming(source, self.wait, offset=offset, tries=tries, delay_s=self.resume_delay_s)

    def store(self, name: str) -> Store:
        """Return the image store of that name in the settings, or raise InvalidRequest."""
        if name not in self.stores:
            what = f"There is no image store named {name!r}"
            raise misused(InvalidRequest(what, "stores", f"The settings have: {', '.join(self.stores) or 'none'}"))
        return self.stores[name]
