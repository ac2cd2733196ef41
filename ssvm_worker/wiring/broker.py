"""What lies behind the broker, opened by the settings: the ledger, and all that workers share through it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ssvm_worker.artifacts.layout import check_zone
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ObjectNotFound, StoreUnavailable
from ssvm_worker.jobs import Job, find_job
from ssvm_worker.jobs.attempt import SubJob
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.ledger.quota import Quota
from ssvm_worker.ledger.scrub_results import ScrubResults
from ssvm_worker.ledger.slots import Slots
from ssvm_worker.net.broker_url import with_options

#: Seconds to see whether somebody listens; the client has its own.
_LOOK_S = 3.0

if TYPE_CHECKING:
    from ssvm_worker.ledger.events import Events
    from ssvm_worker.ledger.job_metrics import JobMetrics
    from ssvm_worker.ledger.ledger import Ledger
    from ssvm_worker.ledger.links.redis import LinkBook
    from ssvm_worker.ledger.record import NewJob
    from ssvm_worker.ledger.workers import WorkerRegistry


def broker_url(settings: Settings) -> str:
    """Where the broker is; an embedded one is found by the file that its worker left in state_dir."""
    if settings.broker.embedded:
        from ssvm_worker.ledger.embedded import url_of

        return url_of(settings.state_dir)
    given = settings.broker
    secret = given.sentinel_password.get_secret_value() if given.sentinel_password else None
    return with_options(given.url.get_secret_value(), given.ca_file, secret)


def open_ledger(settings: Settings) -> Ledger:
    """The ledger of jobs; a context manager."""
    url, prefix = broker_url(settings), settings.broker.prefix
    _refuse_closed(url)
    from ssvm_worker.ledger.ledger import Ledger

    ledger, given = settings.ledger, settings.limits
    keep_s = ledger.keep_days * 24 * 3600
    limits = {"store": given.per_store, "source": given.per_source_host, "account": given.per_account}
    return Ledger(url, prefix=prefix, claim_s=ledger.claim_s, keep_s=keep_s, limits=limits)


def kept_ledger(settings: Settings) -> Ledger:
    """The ledger of jobs, connected once in this process and left open: connecting costs more than a claim does."""
    key = (os.getpid(), broker_url(settings), settings.broker.prefix)
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = open_ledger(settings)
    return _KEPT[key]


_KEPT: dict[tuple[int, str, str], Ledger] = {}


@dataclass(frozen=True)
class RecordedJobs:
    """What the ledger knows of all jobs, by one connection of this process; a job that is held has its own."""

    settings: Settings

    def live(self) -> Collection[str]:
        return frozenset(kept_ledger(self.settings).live())

    @contextlib.contextmanager
    def hold(self, resource: str) -> Iterator[Callable[[], None] | None]:
        """A job of its own in the ledger, already claimed; should we die, a worker goes on with it."""
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
                if ledger.get(job_id).state == "succeeded":  # and what it has made has gone since
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


def _refuse_closed(url: str) -> None:
    """Raise StoreUnavailable where nobody listens, before the client is loaded: that takes as long as a small job.

    A foreground run asks without any broker as a rule. What cannot be told by a port is left to the client.
    """
    parts = urlsplit(url)
    if "redis" in sys.modules or parts.scheme not in ("redis", "rediss"):
        return
    try:
        host, port = parts.hostname or "localhost", parts.port or 6379
        socket.create_connection((host, port), _LOOK_S).close()
    except ConnectionRefusedError as error:
        what = f"The broker cannot be reached: {error}"
        raise StoreUnavailable(what, f"{host}:{port}", "Check broker.url, and that it runs there") from error
    except (OSError, ValueError):
        return


def _here() -> str:
    """Who runs a job: host and process, as people find it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def end_links(settings: Settings, dry_run: bool) -> int:
    """Forget links that have ended, and cancel uploads that wait for more by them; returns how many there were."""
    from ssvm_worker.ledger.link_expiry import end_links as end
    from ssvm_worker.ledger.link_expiry import end_strays

    with open_ledger(settings) as ledger, contextlib.closing(open_links(settings)) as book:
        return len(book.gone()) if dry_run else end(ledger, book) + end_strays(ledger, book)


def open_slots(settings: Settings) -> Slots:
    """The slots that all workers of the broker share; nothing is connected yet."""
    from ssvm_worker.ledger.slots.redis import SharedSlots

    return SharedSlots(broker_url(settings), prefix=settings.broker.prefix, claim_s=settings.ledger.claim_s)


def open_verdicts(settings: Settings) -> ScrubResults:
    """What reading artifacts again has found, for all workers; StoreUnavailable where there is no broker."""
    _refuse_closed(broker_url(settings))
    from ssvm_worker.ledger.scrub_results.redis import SharedScrubResults

    return SharedScrubResults(broker_url(settings), prefix=settings.broker.prefix)


def open_quota(settings: Settings) -> Quota:
    """What accounts have stored, for all workers; StoreUnavailable where there is no broker."""
    _refuse_closed(broker_url(settings))
    from ssvm_worker.ledger.quota.redis import SharedQuota

    return SharedQuota(broker_url(settings), prefix=settings.broker.prefix, claim_s=settings.ledger.claim_s)


def open_registry(settings: Settings) -> WorkerRegistry:
    """The workers that the broker has heard of; nothing is connected yet."""
    from ssvm_worker.ledger.workers import WorkerRegistry

    return WorkerRegistry(broker_url(settings), prefix=settings.broker.prefix)


def open_figures(settings: Settings) -> JobMetrics:
    """What the ledger counts; nothing is connected yet."""
    from ssvm_worker.ledger.job_metrics import JobMetrics

    return JobMetrics(broker_url(settings), prefix=settings.broker.prefix)


def open_events(settings: Settings) -> Events:
    """The stream of what happens to jobs; nothing is connected yet."""
    from ssvm_worker.ledger.events import Events

    return Events(broker_url(settings), prefix=settings.broker.prefix)


def open_links(settings: Settings) -> LinkBook:
    """The book of links; nothing is connected yet."""
    from ssvm_worker.ledger.links.redis import LinkBook

    return LinkBook(broker_url(settings), prefix=settings.broker.prefix)


def new_job(settings: Settings, job: Job, data: Any, *, default_id: str = "", zone: str = "") -> NewJob:
    """A request object as the ledger takes it; InvalidRequest lists all that is wrong with it.

    Its id is the request's own, else *default_id*, else one that is made up. Defaults are left out, so that the same
    request is recognised whichever of them its sender spelt out.
    """
    from ssvm_worker.ledger.record import NewJob

    request = parse_request(job.Request, data, job.name)
    job_id = request.job_id or default_id or uuid.uuid4().hex
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
