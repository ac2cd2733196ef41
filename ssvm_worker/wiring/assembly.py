"""Turns settings into working parts: the one place that names concrete classes.

SDKs are imported when a part is first wanted, so that ``ssvm list`` of a directory does not wait for vSphere's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.config.credentials import authorization, named_credentials
from ssvm_worker.config.schema import Keep as KeepSettings
from ssvm_worker.config.schema import Settings
from ssvm_worker.config.types import Section
from ssvm_worker.errors import Cancelled, ConfigError, InvalidRequest, misused
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.attempt import Attempt, BootOptions, JobLimits, Progress, RemoteSource
from ssvm_worker.jobs.cleanup.retention import RetentionRule, RetentionRules
from ssvm_worker.jobs.request import JobRequest, redact
from ssvm_worker.ledger.links import Signer, local_key
from ssvm_worker.ledger.quota import QuotaLimits as Quotas
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.stores import open_destination, open_origin, open_store, sweep_destination
from ssvm_worker.stores.s3.stall_watch import forget_silence
from ssvm_worker.streaming.interfaces import Check, Sink, Source, Store
from ssvm_worker.streaming.rate_limit import SharedRateLimit

from .broker import (
    RecordedJobs,
    broker_url,
    end_links,
    kept_ledger,
    new_job,
    open_events,
    open_figures,
    open_ledger,
    open_links,
    open_quota,
    open_registry,
    open_slots,
    open_verdicts,
)
from .own_stores import refuse_stores

if TYPE_CHECKING:
    from ssvm_worker.ledger.record import Record

    from .sources import Origins


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

#: What S3 stores and credentials have in common.
_S3_VALUES = ("endpoint", "region", "access_key", "secret_key", "addressing", "ca_file", "proxy", "stall_s", "commit_s")
#: Made when the worker starts, so that its processes share it.
_PACE = SharedRateLimit()


def _unchecked() -> None:
    """For callers that cannot be cancelled."""


class Stores(Mapping[str, Store]):
    """The image stores of the settings by name, each opened when it is first asked for."""

    def __init__(self, settings: Settings, check: Check = _unchecked) -> None:
        """*check* is called while a store waits for its server, and raises if the caller must stop."""
        self._settings = settings
        self._check = check
        self._opened: dict[str, Store] = {}

    def checked(self, check: Check) -> Stores:
        """Return the same stores, opened again, with another *check*."""
        return Stores(self._settings, check)

    def __getitem__(self, name: str) -> Store:
        if name not in self._opened:
            self._opened[name] = _open(name, self._settings, self._check)
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings.stores)

    def __len__(self) -> int:
        return len(self._settings.stores)

    def __contains__(self, name: object) -> bool:
        return name in self._settings.stores


def open_store_named(settings: Settings, name: str) -> Store:
    """The image store of that name; InvalidRequest lists those there are."""
    stores = Stores(settings)
    if name not in stores:
        what = f"There is no image store named {name!r}"
        raise misused(InvalidRequest(what, "stores", f"The settings have: {', '.join(stores) or 'none'}"))
    return stores[name]


def _open(name: str, settings: Settings, check: Check) -> Store:
    store = settings.stores[name]
    if store.url.startswith("nfs://"):
        return open_store(name, store.url, **_nfs_values(settings), check=check)
    values = {key: _revealed(value) for key, value in store if key not in ("url", "backup_mode")}
    return open_store(name, store.url, notes_dir=settings.state_dir / "s3", check=check, **values)


def _nfs_values(settings: Settings) -> dict[str, Any]:
    nfs = settings.nfs
    return {**_given(nfs), "mount_root": nfs.mount_root or settings.state_dir / "nfs"}


def _given(section: Section) -> dict[str, Any]:
    return {key: value for key, value in section if value is not None}


def _revealed(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


class _Later:
    """A part that is made when it is first used: redis takes a third of the time in which `ssvm run` starts."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> Any:
        self.__dict__["_made"] = made = self.__dict__.get("_made") or self._make()
        return getattr(made, name)


@dataclass(frozen=True)
class ConfiguredConnections:
    """Opens what lies outside the stores, by the settings: the ``Connections`` of an attempt."""

    settings: Settings

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
        """The object that the first URL names, or any other."""
        return self._origins().source(
            urls, headers=headers, credentials=credentials, checksum=checksum, check=check, validator=validator
        )

    def text(self, url: str, *, check: Check) -> str:
        """A small text file."""
        return self._origins().text(url, check=check)

    def destination(
        self, url: str, *, size: int, credentials: str | None, headers: Mapping[str, str], attempt: Attempt
    ) -> Sink:
        """Where an upload goes."""
        values = self._s3_values(url, credentials) | self._upload_values()
        named = named_credentials(self.settings, credentials, url)
        refuse_stores(self.settings, url, values.get("endpoint"))
        headers = {**headers, **authorization(named)}
        return open_destination(url, size, owner=attempt.owner, headers=headers, check=attempt.check, **values)

    def sweep_destination(self, url: str, *, credentials: str | None, check: Check) -> None:
        """Abort uploads that dead attempts have left open there."""
        values = self._s3_values(url, credentials)
        refuse_stores(self.settings, url, values.get("endpoint"))
        sweep_destination(url, check=check, **values)

    def vcenter(self, name: str, *, check: Check) -> Any:
        """A session with that vCenter; a context manager."""
        from ssvm_worker.vmware.session import Address, ExportOptions, VCenterSession

        if name not in self.settings.vcenters:
            known = ", ".join(self.settings.vcenters) or "none"
            what = f"There is no vCenter named {name!r}"
            raise misused(InvalidRequest(what, "vcenters", f"The settings have: {known}"))
        values = {key: _revealed(value) for key, value in self.settings.vcenters[name]}
        options = {"spill_dir": self.settings.state_dir / "spill", **_given(self.settings.backup)}
        return VCenterSession(Address(**values), check, ExportOptions(**options))

    def _origins(self) -> Origins:
        from .sources import Origins

        return Origins(self.settings, lambda name: open_store_named(self.settings, name), self._s3_origin)

    def _s3_origin(self, url: str, credentials: str | None, check: Check) -> Source:
        """Without keys nothing is signed: a stranger's URL must not be read by the keys of our stores or machine."""
        download = self.settings.download
        values = self._s3_values(url, credentials, download.allow_stores) if credentials else {}
        refuse_stores(self.settings, url, values.get("endpoint"), download.allow_stores)
        values |= {"stall_s": download.stall_s, "min_rate": download.min_rate, "check": check}
        values |= {"connect_timeout_s": download.connect_timeout_s}
        anonymous = not values.get("access_key") and not self._by_role(credentials)
        return open_origin(url, **values, anonymous=anonymous)

    def _upload_values(self) -> dict[str, Any]:
        upload = self.settings.upload
        return {
            "rule": AddressRule(self.settings.networks_of(upload)),
            "http_ca_file": str(upload.ca_file) if upload.ca_file else None,
        }

    def _s3_values(self, url: str, name: str | None, allow_stores: Collection[str] | None = None) -> dict[str, Any]:
        """Endpoint and keys by that name; nothing for another URL than s3://.

        The keys of a store are lent to downloads only, from the stores of *allow_stores*. Neither they nor the role of
        the machine are ever used unasked: who sends a request chooses its bucket.
        """
        if url.partition(":")[0].lower() != "s3":
            return {}
        found: Any
        if name in self.settings.stores and name in (allow_stores or ()):
            found = self.settings.stores[name]
        elif name is None or name in self.settings.stores:
            raise InvalidRequest(
                f"The keys of the image store {name!r} are for its own jobs" if name else "s3:// needs credentials",
                "credentials",
                f"Name one of [credentials.NAME]: {', '.join(self.settings.credentials) or 'there is none'}",
            )
        else:
            found = named_credentials(self.settings, name, url)
            if allow_stores is None and not found.access_key and not found.machine_role:
                what = f"The credentials {name!r} have no S3 keys"
                raise ConfigError(what, f"credentials.{name}", "Set access_key and secret_key, or machine_role")
        return {key: _revealed(value) for key, value in found if key in _S3_VALUES}

    def _by_role(self, name: str | None) -> bool:
        return name in self.settings.credentials and self.settings.credentials[name].machine_role


def make_attempt(
    settings: Settings,
    job_id: str,
    *,
    publish: Callable[[dict[str, Any]], None] | None = None,
    **given: Any,
) -> Attempt:
    """An attempt at a job with everything that it may touch; *given* are further fields of ``Attempt``."""
    download = settings.download
    names = ("max_bytes", "max_virtual_size", "max_ratio", "max_rate", "resumes", "scratch_dir", "checksums")
    limits = JobLimits(
        min_store_rate=settings.worker.min_store_rate or 0, **{name: getattr(download, name) for name in names}
    )
    boot = settings.boot
    folder = boot.dir or settings.state_dir / "boot"
    given.setdefault("boots", BootOptions(folder, boot.memory, boot.seconds, boot.still_s, boot.accelerator))
    given.setdefault("pace", _PACE)
    given.setdefault("backup_modes", {name: store.backup_mode for name, store in settings.stores.items()})
    given.setdefault("log", logging.LoggerAdapter(logging.getLogger("ssvm.job"), {"job_id": job_id}))
    progress = Progress(publish) if publish else Progress()
    given.setdefault("jobs", RecordedJobs(settings))
    given.setdefault("verdicts", _Later(lambda: open_verdicts(settings)))
    given.setdefault("quota", _Later(lambda: open_quota(settings)))
    given.setdefault("quotas", quota_limits(settings))
    given.setdefault("retention", retention_rules(settings))
    given.setdefault("end_links", partial(end_links, settings))
    given.setdefault("vcenters", tuple(settings.vcenters))
    stores = Stores(settings, partial(_stop, given.get("stop_reason", lambda: None)))
    forget_silence()
    return Attempt(job_id, stores, ConfiguredConnections(settings), limits=limits, progress=progress, **given)


def _stop(stop_reason: Callable[[], str | None]) -> None:
    if reason := stop_reason():
        raise Cancelled(reason)


def quota_limits(settings: Settings) -> Quotas:
    """What accounts may store, by the settings."""
    return Quotas(settings.quota.default, settings.quota.accounts)


def retention_rules(settings: Settings) -> RetentionRules:
    """Which backups are kept, by the settings."""
    names = ("keep_last", "keep_daily", "keep_weekly", "keep_monthly")

    def rule(section: KeepSettings) -> RetentionRule:
        return RetentionRule(**{name: getattr(section, name) for name in names})

    given = settings.retention
    tables = [{name: rule(each) for name, each in table.items()} for table in (given.accounts, given.volumes)]
    return RetentionRules(rule(given), *tables)


def link_signer(settings: Settings) -> Signer:
    """Signs and checks links by the keys of the settings; without any by one of this machine, made when first wanted.

    Raises ConfigError for a key that there is not, or that cannot be made.
    """
    given = settings.serve
    if given.keys or given.key:
        return Signer({name: key.secret.get_secret_value() for name, key in given.keys.items()}, given.key or "")
    return Signer({"local": local_key(settings.state_dir / "link-key")}, "local")


def shown(record: Record) -> dict[str, Any]:
    """A job's record as people and programs may see it: no secrets."""
    # Of a job that only another version has, the fields that every job has are known.
    model = JOBS[record.job].Request if record.job in JOBS else JobRequest
    return record.to_dict(lambda request: redact(request, model))
