"""Create attempts from the settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ssvm_worker.config.schema import Settings
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.attempt import Attempt, Progress
from ssvm_worker.jobs.connections import Connections
from ssvm_worker.jobs.request import JobRequest, redact
from ssvm_worker.jobs.services import JobServices
from ssvm_worker.ledger.links import Signer, local_key
from ssvm_worker.stores.s3.stall_watch import forget_silence
from ssvm_worker.streaming.pipeline import SharedRateLimit

from .broker import (
    RecordedJobs,
    SharedServices,
    broker_url,
    end_links,
    kept_ledger,
    new_job,
    open_agents,
    open_cloudstack_web,
    open_events,
    open_job_metrics,
    open_ledger,
    open_links,
    open_quota,
    open_registry,
    open_slots,
    open_verdicts,
    open_waiting_messages,
)
from .connections import ConfiguredConnections
from .stores import Stores, open_answering_store, open_store_named, store_to_examine

if TYPE_CHECKING:
    from ssvm_worker.ledger.record import Record

__all__ = [
    "ConfiguredConnections",
    "RecordedJobs",
    "Stores",
    "broker_url",
    "end_links",
    "kept_ledger",
    "link_signer",
    "make_attempt",
    "new_job",
    "open_agents",
    "open_answering_store",
    "open_cloudstack_web",
    "open_events",
    "open_job_metrics",
    "open_ledger",
    "open_links",
    "open_quota",
    "open_registry",
    "open_services",
    "open_slots",
    "open_store_named",
    "open_verdicts",
    "open_waiting_messages",
    "shown",
    "store_to_examine",
]

#: Created when the worker starts, so that all its processes share it.
_RATE_LIMIT = SharedRateLimit()


class AttemptOptions(TypedDict, total=False):
    """Fields of ``Attempt`` that depend on the caller of ``make_attempt``, not on the settings."""

    number: int
    token: int
    stop_reason: Callable[[], str | None]
    confirm: Callable[[], None]
    will_resume: Callable[[BaseException], bool]


def make_attempt(
    settings: Settings,
    job_id: str,
    services: JobServices | None = None,
    *,
    publish: Callable[[dict[str, Any]], None] = lambda _: None,
    is_foreground: bool = False,
    **options: Unpack[AttemptOptions],
) -> Attempt:
    """Return an attempt at a job with all its stores and services. *publish* gets its progress.

    *is_foreground*: a person waits, so a store that hangs gives an error in time.
    """
    forget_silence()
    return Attempt(
        job_id=job_id,
        stores=Stores(settings, answering=is_foreground),
        services=services or open_services(settings, shared_slots=False),
        settings=settings,
        progress=Progress(publish),
        log=logging.LoggerAdapter(logging.getLogger("ssvm.job"), {"job_id": job_id}),
        **options,
    )


def open_services(
    settings: Settings, connections: Connections | None = None, *, shared_slots: bool = True
) -> SharedServices:
    """Return the services of all workers of the broker. This does not connect yet."""
    connections = connections or ConfiguredConnections(settings)
    return SharedServices(settings=settings, connections=connections, rate_limit=_RATE_LIMIT, shared_slots=shared_slots)


def link_signer(settings: Settings) -> Signer:
    """Return the signer of links with the keys of the settings.

    Without keys it uses a key of this machine, which it creates at first use. Raises ConfigError for an unknown key,
    and if that key cannot be created.
    """
    given = settings.serve
    if given.keys or given.key:
        return Signer({name: key.secret.get_secret_value() for name, key in given.keys.items()}, given.key or "")
    return Signer({"local": local_key(settings.state_dir / "link-key")}, "local")


def shown(record: Record) -> dict[str, Any]:
    """Return the public JSON of a job's record, without secrets."""
    # Another version may have jobs that this version does not know. It knows only their common fields.
    model = JOBS[record.job].Request if record.job in JOBS else JobRequest
    return record.to_dict(lambda request: redact(request, model))
