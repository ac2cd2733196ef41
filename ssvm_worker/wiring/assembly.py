"""Create attempts from the settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ssvm_worker.config.schema import Keep as KeepSettings
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import Cancelled
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.attempt import Attempt, BootOptions, JobLimits, Jobs, Progress
from ssvm_worker.jobs.cleanup.retention import RetentionRule, RetentionRules
from ssvm_worker.jobs.request import JobRequest, redact
from ssvm_worker.ledger.links import Signer, local_key
from ssvm_worker.ledger.quota import QuotaLimits as Quotas
from ssvm_worker.ledger.slots import Slots
from ssvm_worker.stores.s3.stall_watch import forget_silence
from ssvm_worker.streaming.pipeline import SharedRateLimit

from .broker import (
    LazyQuota,
    LazyScrubResults,
    RecordedJobs,
    broker_url,
    end_links,
    kept_ledger,
    new_job,
    open_agents,
    open_cloudstack_web,
    open_events,
    open_figures,
    open_ledger,
    open_links,
    open_quota,
    open_registry,
    open_slots,
    open_verdicts,
)
from .connections import ConfiguredConnections
from .stores import Stores, open_store_named

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
    "open_cloudstack_web",
    "open_events",
    "open_figures",
    "open_ledger",
    "open_links",
    "open_quota",
    "open_registry",
    "open_slots",
    "open_store_named",
    "open_verdicts",
    "quota_limits",
    "retention_rules",
    "shown",
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
    slots: Slots
    jobs: Jobs


def make_attempt(
    settings: Settings,
    job_id: str,
    *,
    publish: Callable[[dict[str, Any]], None] | None = None,
    **options: Unpack[AttemptOptions],
) -> Attempt:
    """Return an attempt at a job with all its stores and connections. *publish* gets its progress."""
    download = settings.download
    names = ("max_bytes", "max_virtual_size", "max_ratio", "max_rate", "resumes", "scratch_dir", "checksums")
    limits = JobLimits(
        min_store_rate=settings.worker.min_store_rate or 0, **{name: getattr(download, name) for name in names}
    )
    boot = settings.boot
    folder = boot.dir or settings.state_dir / "boot"
    options.setdefault("jobs", RecordedJobs(settings))
    stop_reason = options.get("stop_reason", lambda: None)

    def check() -> None:
        if reason := stop_reason():
            raise Cancelled(reason)

    forget_silence()
    return Attempt(
        job_id,
        Stores(settings, check),
        ConfiguredConnections(settings),
        limits=limits,
        boots=BootOptions(folder, boot.memory, boot.seconds, boot.still_s, boot.accelerator),
        progress=Progress(publish) if publish else Progress(),
        log=logging.LoggerAdapter(logging.getLogger("ssvm.job"), {"job_id": job_id}),
        pace=_RATE_LIMIT,
        backup_modes={name: store.backup_mode for name, store in settings.stores.items()},
        verdicts=LazyScrubResults(settings),
        quota=LazyQuota(settings),
        quotas=quota_limits(settings),
        retention=retention_rules(settings),
        end_links=partial(end_links, settings),
        vcenters=tuple(settings.vcenters),
        **options,
    )


def quota_limits(settings: Settings) -> Quotas:
    """Return the quotas of the accounts."""
    return Quotas(settings.quota.default, settings.quota.accounts)


def retention_rules(settings: Settings) -> RetentionRules:
    """Return the retention rules for backups."""
    names = ("keep_last", "keep_daily", "keep_weekly", "keep_monthly")

    def rule(section: KeepSettings) -> RetentionRule:
        return RetentionRule(**{name: getattr(section, name) for name in names})

    given = settings.retention
    tables = [{name: rule(each) for name, each in table.items()} for table in (given.accounts, given.volumes)]
    return RetentionRules(rule(given), *tables)


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
