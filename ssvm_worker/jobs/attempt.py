"""The attempt: everything that a running job may use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ssvm_worker.artifacts.checksums import HEX_LENGTHS
from ssvm_worker.errors import Cancelled, InvalidRequest, misused
from ssvm_worker.ledger.quota import UNLIMITED, Held, LocalQuota, Quota
from ssvm_worker.ledger.quota import QuotaLimits as Quotas
from ssvm_worker.ledger.scrub_results import LocalScrubResults, ScrubResults
from ssvm_worker.ledger.slots import LocalSlots, Slots
from ssvm_worker.streaming.interfaces import Check, Owner, Source, Store
from ssvm_worker.streaming.pipeline import Resuming, SharedRateLimit

from .cleanup.retention import RetentionRules
from .connections import Connections


class Progress:
    """Progress of an attempt in bytes. Several threads may share it.

    *publish* is called with the snapshot at most every *every_s* seconds, and once at the start of each stage.
    The sum of all ``advance`` calls is the number of moved bytes.
    """

    def __init__(self, publish: Callable[[dict[str, Any]], None] = lambda _: None, every_s: float = 0.5) -> None:
        self.bytes = 0
        #: Moved bytes of all stages.
        self.moved = 0
        self.total: int | None = None
        self.stage = "starting"
        self._publish = publish
        self._every_s = every_s
        self._last = 0.0
        self._started = time.monotonic()
        self._stage_bytes = 0
        self._lock = threading.Lock()

    def start(self, stage: str, total: int | None = None, done: int = 0) -> None:
        """Begin a stage of *total* bytes, of which *done* bytes exist already."""
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


@runtime_checkable
class Checked(Protocol):
    """Stores that call a function regularly while they wait for a server."""

    def checked(self, check: Check) -> Mapping[str, Store]:
        """Return the same stores, opened again with that *check*."""


class SubJob(Protocol):
    """A claimed job that the attempt at another job runs itself."""

    job_id: str
    token: int
    #: The result for its record.
    result: dict[str, Any]

    @property
    def confirm(self) -> Callable[[], None]:
        """Return a function that raises Cancelled("fenced") if the claim is lost."""

    def stop_reason(self) -> str | None:
        """Return why the job must stop, or None."""


class Jobs(Protocol):
    """All jobs that the ledger knows. Each method raises StoreUnavailable while the ledger is unreachable."""

    def live(self) -> Collection[str]:
        """Return the resources that queued and running jobs may write; see ``Job.resource``."""

    def hold(self, resource: str) -> AbstractContextManager[Callable[[], None] | None]:
        """Lock *resource* while the block runs.

        Yields a function that raises Cancelled once the lock is lost. Yields None if another job holds the resource.
        """

    def begin(
        self, parent_job_id: str, job_id: str, job: str, request: dict[str, Any]
    ) -> AbstractContextManager[SubJob | None]:
        """Claim a job with a separate record while the block runs, as a part of the job *parent_job_id*.

        Yields None if another worker runs that job, or if another job writes the same resource. If this process dies,
        a worker runs the job to its end. A failed job of that id is run again.
        """

    def parts(self, parent_job_id: str) -> Iterable[Mapping[str, Any]]:
        """Return the records of all parts of that job, of all its attempts."""

    def ended(self, job_id: str) -> bool:
        """Return whether the ledger knows that job and the job has ended."""

    def expired(self) -> int:
        """Return how many records are past retention."""

    def expire(self) -> int:
        """Delete some records that are past retention. Return how many; 0 if there are none left."""


@dataclass
class UnrecordedJob:
    """A ``SubJob`` without a record in a ledger."""

    job_id: str
    token: int = 0
    result: dict[str, Any] = field(default_factory=dict)

    def confirm(self) -> None:
        """Return: this job has no claim that it could lose."""

    def stop_reason(self) -> str | None:
        """Return None: no ledger can cancel this job."""
        return None


class NullJobs:
    """The ``Jobs`` of an attempt without a ledger: there are no other jobs."""

    def live(self) -> Collection[str]:
        return ()

    def hold(self, resource: str) -> AbstractContextManager[Callable[[], None] | None]:  # noqa: ARG002
        return nullcontext(lambda: None)

    def begin(
        self,
        parent_job_id: str,  # noqa: ARG002
        job_id: str,
        job: str,  # noqa: ARG002
        request: dict[str, Any],  # noqa: ARG002
    ) -> AbstractContextManager[SubJob | None]:
        return nullcontext(UnrecordedJob(job_id))

    def parts(self, parent_job_id: str) -> Iterable[Mapping[str, Any]]:  # noqa: ARG002
        return ()

    def ended(self, job_id: str) -> bool:  # noqa: ARG002 - there are no records
        return False

    def expired(self) -> int:
        return 0

    def expire(self) -> int:
        return 0


@dataclass(frozen=True)
class JobLimits:
    """The limits of a job, from the settings."""

    #: The largest download in bytes. A request may set a smaller limit.
    max_bytes: int = 1 << 40
    #: The largest virtual size of a disk in bytes.
    max_virtual_size: int = 64 << 40
    #: The largest ratio of decompressed bytes to compressed bytes.
    max_ratio: int = 250
    #: The directory in which images are converted. None: the worker converts no images.
    scratch_dir: Path | None = None
    #: A stream that yields less than 1 MiB is resumed this often in a row. Then the attempt fails.
    resumes: int = 3
    #: Seconds before the first resumption. Each further resumption doubles them.
    resume_delay_s: float = 1.0
    #: Bytes per second of all downloads of a worker together. None: no limit.
    max_rate: int | None = None
    #: Bytes per second that a secondary store must accept while the stream waits for that store. 0: no minimum.
    min_store_rate: int = 0
    #: The checksum algorithms that a request may use.
    checksums: tuple[str, ...] = tuple(HEX_LENGTHS)


@dataclass(frozen=True)
class BootOptions:
    """How the worker boots copies of backups to check that they boot."""

    #: A local directory for scratch files and screenshots. None: the worker boots nothing.
    folder: Path | None = None
    #: The largest memory of a guest in bytes.
    memory: int = 1 << 30
    #: How long the worker watches a guest. It stops earlier after *still_s* seconds without a change of the screen.
    seconds: float = 180.0
    still_s: float = 20.0
    #: auto | kvm | tcg
    accelerator: str = "auto"


#: The slots that foreground runs of this process share.
_LOCAL = LocalSlots()


@dataclass
class Attempt:
    """One run of a job."""

    job_id: str
    stores: Mapping[str, Store]
    connections: Connections
    #: The number of the attempt, from 1.
    number: int = 1
    #: The fencing token of the claim.
    token: int = 0
    limits: JobLimits = field(default_factory=JobLimits)
    boots: BootOptions = field(default_factory=BootOptions)
    progress: Progress = field(default_factory=Progress)
    log: logging.LoggerAdapter[Any] | logging.Logger = field(default_factory=lambda: logging.getLogger("ssvm.job"))
    #: The rate limit that all processes of the worker share.
    pace: SharedRateLimit = field(default_factory=SharedRateLimit)
    #: full | incremental by name of the primary store. The default is full.
    backup_modes: Mapping[str, str] = field(default_factory=dict)
    #: Returns why the attempt must stop (user | shutdown | deadline | fenced), or None. Cheap: called for every chunk.
    stop_reason: Callable[[], str | None] = lambda: None
    #: Raises Cancelled("fenced") if the claim is lost. Called right before each commit.
    confirm: Callable[[], None] = lambda: None
    #: Returns whether another attempt follows after that error. If so, the job keeps partial bytes.
    will_resume: Callable[[BaseException], bool] = lambda _: False
    #: The slots that all workers share, or the slots of this process.
    slots: Slots = _LOCAL
    #: The other jobs. The first call connects to the ledger.
    jobs: Jobs = field(default_factory=NullJobs)
    #: The results of verifications, in the ledger or in this attempt.
    verdicts: ScrubResults = field(default_factory=LocalScrubResults)
    #: The usage of the accounts, in the ledger or in this attempt, and their limits.
    quota: Quota = field(default_factory=LocalQuota)
    quotas: Quotas = field(default_factory=Quotas)
    #: The bytes that this job reserves of its account's quota. It observes every stream to a store.
    held: Held = UNLIMITED
    #: The backups that clean-up keeps.
    retention: RetentionRules = field(default_factory=RetentionRules)
    #: Removes expired links and cancels their unfinished uploads. With True (a dry run) it only counts them.
    end_links: Callable[[bool], int] = lambda _: 0
    #: The names of the vCenters in the settings.
    vcenters: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stores, Checked):
            # The attempt of ``for_cleanup`` is a copy. It must not stop at the check of the first attempt.
            self.stores = self.stores.checked(self.check)

    @property
    def owner(self) -> Owner:
        """Return the writer of this attempt's uncommitted bytes on the stores."""
        return Owner(self.job_id, self.token)

    def check(self) -> None:
        """Raise Cancelled if this attempt must stop."""
        if reason := self.stop_reason():
            raise Cancelled(reason)

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

    def wait(self, seconds: float) -> None:
        """Sleep. Raise Cancelled within 0.25 s if the attempt must stop."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.25))
        self.check()

    def slot(self, name: str, limit: int) -> AbstractContextManager[None]:
        """Hold one of *limit* slots of that name while the block runs.

        Entering waits for a free slot, and raises Cancelled if the attempt must stop.
        """
        return self.slots.hold(name, limit, self.wait)

    def resuming(self, source: Source, offset: int = 0) -> Resuming:
        """Return the bytes of a source, resumed after failures within this attempt's limits."""
        limits = self.limits
        return Resuming(source, self.wait, offset=offset, tries=limits.resumes, delay_s=limits.resume_delay_s)

    def store(self, name: str) -> Store:
        """Return the image store of that name in the settings, or raise InvalidRequest."""
        if name not in self.stores:
            what = f"There is no image store named {name!r}"
            raise misused(InvalidRequest(what, "stores", f"The settings have: {', '.join(self.stores) or 'none'}"))
        return self.stores[name]
