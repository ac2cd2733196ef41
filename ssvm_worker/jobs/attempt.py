"""What a running job may touch, and nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ssvm_worker.artifacts.checksums import HEX_LENGTHS, Digest
from ssvm_worker.errors import Cancelled, InvalidRequest, misused
from ssvm_worker.ledger.quota import UNLIMITED, Held, LocalQuota, Quota
from ssvm_worker.ledger.quota import QuotaLimits as Quotas
from ssvm_worker.ledger.scrub_results import LocalScrubResults, ScrubResults
from ssvm_worker.ledger.slots import LocalSlots, Slots
from ssvm_worker.streaming.interfaces import Check, Owner, Sink, Source, Store
from ssvm_worker.streaming.pipeline import Resuming
from ssvm_worker.streaming.rate_limit import SharedRateLimit, paced

from .cleanup.retention import RetentionRules


class Progress:
    """Bytes done of a total, for whoever watches; advances sum to the bytes moved.

    *publish* is called with the snapshot at most twice a second, and once at the end of each stage.
    """

    def __init__(self, publish: Callable[[dict[str, Any]], None] = lambda _: None, every_s: float = 0.5) -> None:
        self.bytes = 0
        #: By all stages together.
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
        """A new stage of *total* bytes begins, of which *done* were there already."""
        with self._lock:
            self.stage, self.total, self.bytes = stage, total, done
            self._stage_bytes, self._started = done, time.monotonic()
        self.publish()

    def advance(self, size: int) -> None:
        """More bytes have passed; safe from several threads."""
        with self._lock:
            self.bytes += size
            self.moved += size
            due = time.monotonic() - self._last >= self._every_s
        if due:
            self.publish()

    def saw(self, chunk: bytes) -> None:
        """``advance`` as an observer of chunks."""
        self.advance(len(chunk))

    def publish(self) -> None:
        """Tell now."""
        self._last = time.monotonic()
        self._publish(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """stage, bytes, total (or null), rate in bytes a second since the stage began; moved in the whole attempt."""
        elapsed = max(time.monotonic() - self._started, 1e-3)
        rate = round((self.bytes - self._stage_bytes) / elapsed)
        return {"stage": self.stage, "bytes": self.bytes, "total": self.total, "rate": rate, "moved": self.moved}


class RemoteSource(Source, Protocol):
    """A source outside our stores."""

    @property
    def validator(self) -> Any:
        """A dataclass that tells this version of the object from any other, or None; known after the first open."""

    @property
    def digests(self) -> Sequence[Digest]:
        """Checksums that came with the URL (a metalink's), of the file as it is offered."""


class Connections(Protocol):
    """Opens what lies outside the stores; assembly knows the concrete classes."""

    def source(
        self,
        urls: Sequence[str],
        *,
        headers: Mapping[str, str],
        credentials: str | None,
        checksum: Digest | None,
        check: Check,
        validator: dict[str, Any] | None,
    ) -> RemoteSource:
        """The object that the first URL names or any other, of the version that *validator* tells.

        Bytes of two places are put together only where a *checksum* will be compared. Raises InvalidRequest.
        """

    def text(self, url: str, *, check: Check) -> str:
        """A small text file, such as SHA256SUMS."""

    def destination(
        self, url: str, *, size: int, credentials: str | None, headers: Mapping[str, str], attempt: Attempt
    ) -> Sink:
        """Where an upload goes: s3://bucket/key, or an http(s) URL that takes a PUT."""

    def sweep_destination(self, url: str, *, credentials: str | None, check: Check) -> None:
        """Abort uploads to exactly this destination that dead attempts have left open."""

    def vcenter(self, name: str, *, check: Check) -> Any:
        """A session with the vCenter of that name in the settings; see vmware.session."""


@runtime_checkable
class Checked(Protocol):
    """Stores that can be told what to call while they wait for a server."""

    def checked(self, check: Check) -> Mapping[str, Store]:
        """Return the same stores, opened again, with that *check*."""


class SubJob(Protocol):
    """A job that an attempt at another one runs itself."""

    job_id: str
    token: int
    #: What its record will tell.
    result: dict[str, Any]

    @property
    def confirm(self) -> Callable[[], None]:
        """Raises Cancelled("fenced") unless its claim still stands."""

    def stop_reason(self) -> str | None:
        """Why it must stop, or None."""


class Jobs(Protocol):
    """What is known of all jobs, everywhere. Each call raises StoreUnavailable while the ledger is away."""

    def live(self) -> Collection[str]:
        """What queued and running jobs may write: see ``Job.resource``."""

    def hold(self, resource: str) -> AbstractContextManager[Callable[[], None] | None]:
        """Within, nobody else may write *resource*; gives what raises if that is no longer so. None: somebody does."""

    def begin(
        self, whole: str, job_id: str, job: str, request: dict[str, Any]
    ) -> AbstractContextManager[SubJob | None]:
        """Within, a job with a record of its own is ours to run, as a part of job *whole*.

        None where it cannot be had now: somebody else runs it, or writes the same thing. Should we die, a worker runs
        it to its end. A job of that id that has failed is tried again.
        """

    def parts(self, whole: str) -> Iterable[Mapping[str, Any]]:
        """The records of the parts of that job, of all its attempts."""

    def ended(self, job_id: str) -> bool:
        """Whether that job is known and has ended."""

    def expired(self) -> int:
        """How many records are past retention."""

    def expire(self) -> int:
        """Drop some of them; returns how many, 0 when there are none left."""


@dataclass
class UnrecordedJob:
    """A ``SubJob`` of which no ledger knows."""

    job_id: str
    token: int = 0
    result: dict[str, Any] = field(default_factory=dict)

    def confirm(self) -> None:
        """See SubJob."""

    def stop_reason(self) -> str | None:
        """See SubJob."""
        return None


class NullJobs:
    """That there are none."""

    def live(self) -> Collection[str]:
        return ()

    def hold(self, resource: str) -> AbstractContextManager[Callable[[], None] | None]:  # noqa: ARG002
        return nullcontext(lambda: None)

    def begin(
        self,
        whole: str,  # noqa: ARG002
        job_id: str,
        job: str,  # noqa: ARG002
        request: dict[str, Any],  # noqa: ARG002
    ) -> AbstractContextManager[SubJob | None]:
        return nullcontext(UnrecordedJob(job_id))

    def parts(self, whole: str) -> Iterable[Mapping[str, Any]]:  # noqa: ARG002
        return ()

    def ended(self, job_id: str) -> bool:  # noqa: ARG002 - none is known
        return False

    def expired(self) -> int:
        return 0

    def expire(self) -> int:
        return 0


@dataclass(frozen=True)
class JobLimits:
    """Plain numbers from the settings."""

    #: Bytes of one download at the most, unless the request says less.
    max_bytes: int = 1 << 40
    #: Bytes of a disk as its guest will see it, at the most.
    max_virtual_size: int = 64 << 40
    #: How many bytes may come out of one that is compressed.
    max_ratio: int = 250
    #: Where images are converted; None: they are not.
    scratch_dir: Path | None = None
    #: How often in a row a stream is taken up again that gives less than 1 MiB, before the attempt fails.
    resumes: int = 3
    #: Seconds before the first of them; it doubles each time.
    resume_delay_s: float = 1.0
    #: Bytes a second of all downloads of a worker together; None: as many as come.
    max_rate: int | None = None
    #: Bytes a second that a store other than the first must take while the stream waits for it; 0: any number.
    min_store_rate: int = 0
    #: The kinds of checksums that a request may come with.
    checksums: tuple[str, ...] = tuple(HEX_LENGTHS)


@dataclass(frozen=True)
class BootOptions:
    """How copies of backups are booted, to see whether they do."""

    #: Scratch files and screenshots, on a local disk; None: nothing is booted.
    folder: Path | None = None
    #: Bytes of a guest's memory at the most.
    memory: int = 1 << 30
    #: How long a guest is watched at the most, and for how long its screen must stand still to be done earlier.
    seconds: float = 180.0
    still_s: float = 20.0
    #: auto | kvm | tcg
    accelerator: str = "auto"


#: What foreground runs share: there is no broker to ask.
_LOCAL = LocalSlots()


@dataclass
class Attempt:
    """One run of a job."""

    job_id: str
    stores: Mapping[str, Store]
    doors: Connections
    #: From 1.
    number: int = 1
    #: The claim's fencing token.
    token: int = 0
    limits: JobLimits = field(default_factory=JobLimits)
    boots: BootOptions = field(default_factory=BootOptions)
    progress: Progress = field(default_factory=Progress)
    log: logging.LoggerAdapter[Any] | logging.Logger = field(default_factory=lambda: logging.getLogger("ssvm.job"))
    #: Shared by all processes of the worker.
    pace: SharedRateLimit = field(default_factory=SharedRateLimit)
    #: full | incremental by name of the primary store; full for those that are not in it.
    backup_modes: Mapping[str, str] = field(default_factory=dict)
    #: Why the attempt must stop (user | shutdown | deadline | fenced), or None. Cheap: called for every chunk.
    stop_reason: Callable[[], str | None] = lambda: None
    #: Raises Cancelled("fenced") unless the claim still stands; called right before each commit.
    confirm: Callable[[], None] = lambda: None
    #: Whether another attempt will follow after that error, so that partial bytes are worth keeping.
    will_resume: Callable[[BaseException], bool] = lambda _: False
    #: Those of all workers, or of this process alone.
    slots: Slots = _LOCAL
    #: As the ledger has them; nothing is connected before the first call.
    jobs: Jobs = field(default_factory=NullJobs)
    #: What reading artifacts again has found; the ledger's, or of this attempt alone.
    verdicts: ScrubResults = field(default_factory=LocalScrubResults)
    #: What accounts have stored, by the ledger or by this attempt alone; and what they may.
    quota: Quota = field(default_factory=LocalQuota)
    quotas: Quotas = field(default_factory=Quotas)
    #: What this job holds of its account's limit; is shown, on its way, all that is stored.
    held: Held = UNLIMITED
    #: Which backups clean-up keeps.
    retention: RetentionRules = field(default_factory=RetentionRules)
    #: Forgets links that have ended, and cancels uploads that wait for more by them, unless told only to count them.
    end_links: Callable[[bool], int] = lambda _: 0
    #: The names of those in the settings.
    vcenters: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stores, Checked):
            # An attempt that cleans up is a copy, which must not stop where the first one had to.
            self.stores = self.stores.checked(self.check)

    @property
    def owner(self) -> Owner:
        """Who writes, for the stores."""
        return Owner(self.job_id, self.token)

    def check(self) -> None:
        """Raise Cancelled if this attempt must stop."""
        if reason := self.stop_reason():
            raise Cancelled(reason)

    def cleaning(self) -> Attempt:
        """This attempt for its clean-up: that it must stop does not keep it from that; that its claim is lost does."""

        def confirm() -> None:
            try:
                self.confirm()
            except Cancelled as error:
                if error.reason == "fenced":
                    raise

        return replace(self, confirm=confirm, stop_reason=lambda: None)

    def wait(self, seconds: float) -> None:
        """Sleep, but not past a cancel."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.25))
        self.check()

    def slot(self, name: str, limit: int) -> AbstractContextManager[None]:
        """Within, one of *limit* slots of that name is ours; entering waits for it, unless the attempt must stop."""
        return self.slots.hold(name, limit, self.wait)

    def resuming(self, source: Source, offset: int = 0) -> Resuming:
        """The bytes of a source once, whatever breaks on the way, within this attempt's limits."""
        limits = self.limits
        return Resuming(source, self.wait, offset=offset, tries=limits.resumes, delay_s=limits.resume_delay_s)

    def paced(self, chunks: Iterable[bytes], max_rate: int | None) -> Iterator[bytes]:
        """Pass the chunks on, not faster than the worker may, nor than *max_rate* bytes a second."""
        rates = [(self.pace, float(self.limits.max_rate))] if self.limits.max_rate else []
        rates += [(SharedRateLimit(), float(max_rate))] if max_rate else []
        return paced(chunks, rates, self.wait)

    def store(self, name: str) -> Store:
        """The image store of that name in the settings."""
        if name not in self.stores:
            what = f"There is no image store named {name!r}"
            raise misused(InvalidRequest(what, "stores", f"The settings have: {', '.join(self.stores) or 'none'}"))
        return self.stores[name]
