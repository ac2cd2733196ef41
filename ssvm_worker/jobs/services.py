"""What jobs share with other jobs and workers: connections, slots, quota, scrub results, the ledger's jobs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from ssvm_worker.ledger.open_snapshots import LocalOpenSnapshots, OpenSnapshots
from ssvm_worker.ledger.quota import LocalQuota, Quota
from ssvm_worker.ledger.scrub_results import LocalScrubResults, ScrubResults
from ssvm_worker.ledger.slots import LocalSlots, Slots
from ssvm_worker.streaming.pipeline import SharedRateLimit

from .connections import Connections


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


#: The slots that foreground runs of this process share.
_LOCAL = LocalSlots()


@dataclass(kw_only=True)
class JobServices:
    """The services of a process without a ledger. ``wiring.broker.SharedServices`` shares them between all workers."""

    connections: Connections
    #: The rate limit that all processes of the worker share.
    rate_limit: SharedRateLimit = field(default_factory=SharedRateLimit)

    @cached_property
    def slots(self) -> Slots:
        """Return the semaphores that limit how many jobs do one thing at once."""
        return _LOCAL

    @cached_property
    def jobs(self) -> Jobs:
        """Return the other jobs."""
        return NullJobs()

    @cached_property
    def scrub_results(self) -> ScrubResults:
        """Return the results of verifications."""
        return LocalScrubResults()

    @cached_property
    def open_snapshots(self) -> OpenSnapshots:
        """Return the snapshots that backup jobs have not yet removed."""
        return LocalOpenSnapshots()

    @cached_property
    def quota(self) -> Quota:
        """Return the usage of the accounts."""
        return LocalQuota()

    def end_links(self, dry_run: bool) -> int:  # noqa: ARG002 - there are no links
        """Remove expired links, and cancel their unfinished uploads. Return their number. A dry run only counts."""
        return 0
