"""Open the ledger and all other data that workers share through the broker."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ssvm_worker.artifacts.layout import check_zone
from ssvm_worker.config.schema import SERVER_PREFIX, Settings
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, StoreUnavailable, misused
from ssvm_worker.jobs import Job, find_job
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.services import Jobs, JobServices, SubJob
from ssvm_worker.ledger.open_snapshots import OpenSnapshots
from ssvm_worker.ledger.quota import Quota
from ssvm_worker.ledger.scrub_results import ScrubResults
from ssvm_worker.ledger.slots import Slots
from ssvm_worker.net.broker_url import with_options

#: The timeout in seconds of the connection test. The Redis client has its own timeout.
_PROBE_S = 3.0

if TYPE_CHECKING:
    from ssvm_worker.ledger.agents import AgentRegistry
    from ssvm_worker.ledger.cloudstack_web import CloudStackWeb
    from ssvm_worker.ledger.events import Events
    from ssvm_worker.ledger.job_metrics import JobMetrics
    from ssvm_worker.ledger.ledger import Ledger
    from ssvm_worker.ledger.links.redis import LinkBook
    from ssvm_worker.ledger.record import NewJob
    from ssvm_worker.ledger.waiting_messages import WaitingMessages
    from ssvm_worker.ledger.workers import WorkerRegistry


def broker_url(settings: Settings) -> str:
    """Return the URL of the broker. For an embedded broker, read it from the file of its worker in state_dir."""
    if settings.broker.embedded:
        from ssvm_worker.ledger.embedded import url_of

        return url_of(settings.state_dir)
    given = settings.broker
    secret = given.sentinel_password.get_secret_value() if given.sentinel_password else None
    return with_options(given.url.get_secret_value(), given.ca_file, secret)


def open_ledger(settings: Settings) -> Ledger:
    """Return the ledger of jobs. It is a context manager."""
    url, prefix = broker_url(settings), settings.broker.prefix
    _raise_if_closed(url)
    from ssvm_worker.ledger.ledger import Ledger

    ledger, given = settings.ledger, settings.limits
    keep_s = ledger.keep_days * 24 * 3600
    limits = {"store": given.per_store, "source": given.per_source_host, "account": given.per_account}
    return Ledger(url, prefix=prefix, claim_s=ledger.claim_s, keep_s=keep_s, limits=limits)


def kept_ledger(settings: Settings) -> Ledger:
    """Return the ledger of this process, which stays open. Connecting takes longer than a claim."""
    key = (os.getpid(), broker_url(settings), settings.broker.prefix)
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = open_ledger(settings)
    return _KEPT[key]


_KEPT: dict[tuple[int, str, str], Ledger] = {}


@dataclass(frozen=True)
class RecordedJobs:
    """``Jobs`` of the ledger, over one connection of this process.

    Each ``hold`` and ``begin`` uses another connection.
    """

    settings: Settings

    def live(self) -> Collection[str]:
        return frozenset(kept_ledger(self.settings).live())

    @contextlib.contextmanager
    def hold(self, resource: str) -> Iterator[Callable[[], None] | None]:
        """Hold the resource with a new clean-up job. If this process dies, a worker continues that job."""
        from ssvm_worker.ledger.inline_job import claim_inline

        request = {"volume": resource}
        with open_ledger(self.settings) as ledger:
            new = new_job(self.settings, find_job("cleanup"), request, default_id=f"cleanup-{uuid.uuid4().hex[:12]}")
            with claim_inline(ledger, new, _here()) as hold:
                yield hold.confirm if hold else None

    @contextlib.contextmanager
    def begin(self, parent_job_id: str, job_id: str, job: str, request: dict[str, Any]) -> Iterator[SubJob | None]:
        from ssvm_worker.ledger.inline_job import claim_inline

        with open_ledger(self.settings) as ledger:
            with contextlib.suppress(ObjectNotFound):
                if ledger.get(job_id).state == "succeeded":  # its result has been deleted since then
                    job_id = f"{job_id}.{uuid.uuid4().hex[:8]}"
            new = new_job(self.settings, find_job(job), request | {"job_id": job_id})
            with claim_inline(ledger, new, _here(), parent_job_id) as hold:
                yield hold

    def parts(self, parent_job_id: str) -> Iterator[Mapping[str, Any]]:
        yield from (each.to_dict() for each in kept_ledger(self.settings).parts(parent_job_id))

    def ended(self, job_id: str) -> bool:
        try:
            return kept_ledger(self.settings).get(job_id).ended
        except ObjectNotFound:
            return False

    def expired(self) -> int:
        return kept_ledger(self.settings).expired()

    def expire(self) -> int:
        return kept_ledger(self.settings).expire()


def _raise_if_closed(url: str) -> None:
    """Raise StoreUnavailable if the port of the broker is closed, before the Redis client is imported.

    The import takes as long as a small job, and a foreground run usually has no broker. This function ignores all
    other problems: the client reports them.
    """
    parts = urlsplit(url)
    if "redis" in sys.modules or parts.scheme not in ("redis", "rediss"):
        return
    try:
        host, port = parts.hostname or "localhost", parts.port or 6379
        socket.create_connection((host, port), _PROBE_S).close()
    except ConnectionRefusedError as error:
        what = f"The broker cannot be reached: {error}"
        raise StoreUnavailable(what, f"{host}:{port}", "Check broker.url and that the broker runs") from error
    except (OSError, ValueError):
        return


def _here() -> str:
    """Return the name of this worker: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


def end_links(settings: Settings, dry_run: bool) -> int:
    """Delete expired links, and cancel their unfinished uploads. Return how many there were.

    A dry run only counts the links.
    """
    from ssvm_worker.ledger.link_expiry import end_links as end
    from ssvm_worker.ledger.link_expiry import end_strays

    with open_ledger(settings) as ledger, contextlib.closing(open_links(settings)) as book:
        return len(book.gone()) if dry_run else end(ledger, book) + end_strays(ledger, book)


def open_slots(settings: Settings) -> Slots:
    """Return the slots that all workers of the broker share. This does not connect yet."""
    from ssvm_worker.ledger.slots.redis import SharedSlots

    return SharedSlots(broker_url(settings), prefix=settings.broker.prefix, claim_s=settings.ledger.claim_s)


def open_verdicts(settings: Settings) -> ScrubResults:
    """Return the scrub results of all workers. Raise StoreUnavailable if the broker is unreachable."""
    _raise_if_closed(broker_url(settings))
    from ssvm_worker.ledger.scrub_results.redis import SharedScrubResults

    return SharedScrubResults(broker_url(settings), prefix=settings.broker.prefix)


def open_snapshots(settings: Settings) -> OpenSnapshots:
    """Return the open snapshots of all workers. Raise StoreUnavailable if the broker is unreachable."""
    _raise_if_closed(broker_url(settings))
    from ssvm_worker.ledger.open_snapshots.redis import SharedOpenSnapshots

    return SharedOpenSnapshots(broker_url(settings), prefix=settings.broker.prefix)


def open_quota(settings: Settings) -> Quota:
    """Return the usage of accounts, for all workers. Raise StoreUnavailable if the broker is unreachable."""
    _raise_if_closed(broker_url(settings))
    from ssvm_worker.ledger.quota.redis import SharedQuota

    return SharedQuota(broker_url(settings), prefix=settings.broker.prefix, claim_s=settings.ledger.claim_s)


@dataclass(kw_only=True)
class SharedServices(JobServices):
    """``JobServices`` of all workers of the broker. Each connects at first use.

    Importing redis takes a third of the start of `ssvm run`.
    """

    settings: Settings
    #: Whether the slots are those of all workers. A foreground run uses those of its process.
    shared_slots: bool = True

    @cached_property
    def slots(self) -> Slots:
        """Return the slots of all workers, or of this process."""
        return open_slots(self.settings) if self.shared_slots else super().slots

    @cached_property
    def jobs(self) -> Jobs:
        """Return the jobs of the ledger."""
        return RecordedJobs(self.settings)

    @cached_property
    def scrub_results(self) -> ScrubResults:
        """Return the scrub results in the ledger."""
        return open_verdicts(self.settings)

    @cached_property
    def open_snapshots(self) -> OpenSnapshots:
        """Return the open snapshots in the ledger."""
        return open_snapshots(self.settings)

    @cached_property
    def quota(self) -> Quota:
        """Return the usage of the accounts in the ledger."""
        return open_quota(self.settings)

    def end_links(self, dry_run: bool) -> int:
        """Remove expired links of the ledger. Return their number."""
        return end_links(self.settings, dry_run)


def open_registry(settings: Settings) -> WorkerRegistry:
    """Return the registry of workers. This does not connect yet."""
    from ssvm_worker.ledger.workers import WorkerRegistry

    return WorkerRegistry(broker_url(settings), prefix=settings.broker.prefix)


def open_agents(settings: Settings) -> AgentRegistry:
    """Return the registry of agents of management servers. This does not connect yet."""
    from ssvm_worker.ledger.agents import AgentRegistry

    return AgentRegistry(broker_url(settings), prefix=settings.broker.prefix)


def open_waiting_messages(settings: Settings) -> WaitingMessages:
    """Return the messages in Redis. This does not connect yet."""
    from ssvm_worker.ledger.waiting_messages import WaitingMessages

    return WaitingMessages(broker_url(settings), prefix=settings.broker.prefix)


def open_job_metrics(settings: Settings) -> JobMetrics:
    """Return the counters of the ledger. This does not connect yet."""
    from ssvm_worker.ledger.job_metrics import JobMetrics

    return JobMetrics(broker_url(settings), prefix=settings.broker.prefix)


def open_events(settings: Settings) -> Events:
    """Return the stream of job events. This does not connect yet."""
    from ssvm_worker.ledger.events import Events

    return Events(broker_url(settings), prefix=settings.broker.prefix)


def open_links(settings: Settings) -> LinkBook:
    """Return the store of links. This does not connect yet."""
    from ssvm_worker.ledger.links.redis import LinkBook

    return LinkBook(broker_url(settings), prefix=settings.broker.prefix)


def open_cloudstack_web(settings: Settings) -> CloudStackWeb:
    """Return what the agents and services of the zone share for a CloudStack server. This does not connect yet."""
    from ssvm_worker.ledger.cloudstack_web import CloudStackWeb

    return CloudStackWeb(broker_url(settings), prefix=settings.broker.prefix, zone=settings.zone)


def new_job(
    settings: Settings, job: Job, data: Any, *, default_id: str = "", zone: str = "", of_server: bool = False
) -> NewJob:
    """Return a new ledger record for a request. Raise InvalidRequest with all problems of the request.

    The id is that of the request, else *default_id*, else a random one. The record omits default values, so that the
    same request is recognised with and without them. *of_server*: a management server's command has made the job. Only
    such a job may have an id that begins with ``cs-``, and so use the names of ``wiring/server_names.py``.
    """
    from ssvm_worker.ledger.record import NewJob

    request = parse_request(job.Request, data, job.name)
    job_id = request.job_id or default_id or uuid.uuid4().hex
    if job_id.startswith(SERVER_PREFIX) and not of_server:
        what = f"Job ids that begin with {SERVER_PREFIX} are those of the agent of a management server"
        raise misused(InvalidRequest(what, "job_id", "Choose another id"))
    zone = check_zone(zone or settings.zone)
    return NewJob(
        job_id=job_id,
        job=job.name,
        zone=zone,
        lane=job.lane,
        request=request.model_dump(mode="json", exclude_defaults=True) | {"job_id": job_id},
        resource=job.resource(request),
        callback_url=request.callback_url,
        priority=request.priority,
        account=getattr(request, "account", ""),
        uses=request.uses(zone),
    )
