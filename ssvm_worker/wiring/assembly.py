"""Create stores, connections and attempts from the settings.

SDKs are imported at first use, so that ``ssvm list`` of a directory does not import the SDK of vSphere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from pydantic import SecretStr

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.config.credentials import authorization, named_credentials
from ssvm_worker.config.schema import Keep as KeepSettings
from ssvm_worker.config.schema import Settings
from ssvm_worker.config.types import Section
from ssvm_worker.errors import Cancelled, ConfigError, InvalidRequest, misused
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.attempt import Attempt, BootOptions, JobLimits, Jobs, Progress, RemoteSource
from ssvm_worker.jobs.cleanup.retention import RetentionRule, RetentionRules
from ssvm_worker.jobs.request import JobRequest, redact
from ssvm_worker.ledger.links import Signer, local_key
from ssvm_worker.ledger.quota import QuotaLimits as Quotas
from ssvm_worker.ledger.slots import Slots
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.stores import open_destination, open_origin, open_store, sweep_destination
from ssvm_worker.stores.s3.stall_watch import forget_silence
from ssvm_worker.streaming.interfaces import Check, Sink, Source, Store
from ssvm_worker.streaming.rate_limit import SharedRateLimit

from .broker import (
    LazyQuota,
    LazyScrubResults,
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

#: The keys that S3 stores and credentials have in common.
_S3_VALUES = ("endpoint", "region", "access_key", "secret_key", "addressing", "ca_file", "proxy", "stall_s", "commit_s")
#: Created when the worker starts, so that all its processes share it.
_RATE_LIMIT = SharedRateLimit()


def _unchecked() -> None:
    """Do nothing: the caller cannot be cancelled."""


class Stores(Mapping[str, Store]):
    """Image stores of the settings by name. Each is opened at its first use."""

    def __init__(self, settings: Settings, check: Check = _unchecked) -> None:
        """Stores call *check* while they wait for their server. It must raise if the caller must stop."""
        self._settings = settings
        self._check = check
        self._opened: dict[str, Store] = {}

    def checked(self, check: Check) -> Stores:
        """Return the same stores with another *check*. They are opened again."""
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
    """Return the image store of that name. Raise InvalidRequest with all known names if there is none."""
    stores = Stores(settings)
    if name not in stores:
        what = f"There is no image store named {name!r}"
        raise misused(InvalidRequest(what, "stores", f"The settings have: {', '.join(stores) or 'none'}"))
    return stores[name]


def _open(name: str, settings: Settings, check: Check) -> Store:
    store = settings.stores[name]
    if store.url.startswith("nfs://"):
        mount_root = settings.nfs.mount_root or settings.state_dir / "nfs"
        return open_store(name, store.url, **{**_given(settings.nfs), "mount_root": mount_root}, check=check)
    values = {key: _revealed(value) for key, value in store if key not in ("url", "backup_mode")}
    return open_store(name, store.url, notes_dir=settings.state_dir / "s3", check=check, **values)


def _given(section: Section) -> dict[str, Any]:
    return {key: value for key, value in section if value is not None}


def _revealed(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


@dataclass(frozen=True)
class ConfiguredConnections:
    """Connections of an attempt to sources, destinations and vCenters, from the settings."""

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
        """Return the source of an object with several URLs. It tries them in order."""
        return self._origins().source(
            urls, headers=headers, credentials=credentials, checksum=checksum, check=check, validator=validator
        )

    def text(self, url: str, *, check: Check) -> str:
        """Return the content of a small text file."""
        return self._origins().text(url, check=check)

    def destination(
        self, url: str, *, size: int, credentials: str | None, headers: Mapping[str, str], attempt: Attempt
    ) -> Sink:
        """Return the sink of an upload."""
        upload = self.settings.upload
        values = self._s3_values(url, credentials) | {
            "rule": AddressRule(self.settings.networks_of(upload)),
            "http_ca_file": str(upload.ca_file) if upload.ca_file else None,
        }
        named = named_credentials(self.settings, credentials, url)
        refuse_stores(self.settings, url, values.get("endpoint"))
        headers = {**headers, **authorization(named)}
        return open_destination(url, size, owner=attempt.owner, headers=headers, check=attempt.check, **values)

    def sweep_destination(self, url: str, *, credentials: str | None, check: Check) -> None:
        """Abort unfinished uploads of earlier attempts to this URL."""
        values = self._s3_values(url, credentials)
        refuse_stores(self.settings, url, values.get("endpoint"))
        sweep_destination(url, check=check, **values)

    def vcenter(self, name: str, *, check: Check) -> Any:
        """Return a session with that vCenter. It is a context manager."""
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
        """Open an s3:// URL. Without credentials the requests are not signed.

        So a sender of requests cannot use the keys of an image store or the role of the machine.
        """
        download = self.settings.download
        values = self._s3_values(url, credentials, download.allow_stores) if credentials else {}
        refuse_stores(self.settings, url, values.get("endpoint"), download.allow_stores)
        values |= {"stall_s": download.stall_s, "min_rate": download.min_rate, "check": check}
        values |= {"connect_timeout_s": download.connect_timeout_s}
        section = self.settings.credentials.get(credentials or "")
        anonymous = not values.get("access_key") and not (section and section.machine_role)
        return open_origin(url, **values, anonymous=anonymous)

    def _s3_values(self, url: str, name: str | None, allow_stores: Collection[str] | None = None) -> dict[str, Any]:
        """Return endpoint and keys of the credentials *name* for an s3:// URL. Return nothing for any other URL.

        Only downloads may use the keys of an image store, and only of a store in *allow_stores*. A request must name
        the credentials explicitly, because its sender chooses the bucket. This also applies to the role of the machine.
        """
        if url.partition(":")[0].lower() != "s3":
            return {}
        found: Any
        if name in self.settings.stores and name in (allow_stores or ()):
            found = self.settings.stores[name]
        elif name is None or name in self.settings.stores:
            shown = f"The keys of the image store {name!r} are for its own jobs only"
            known = ", ".join(self.settings.credentials) or "there is none"
            what = shown if name else "s3:// needs credentials"
            raise InvalidRequest(what, "credentials", f"Name one of [credentials.NAME]: {known}")
        else:
            found = named_credentials(self.settings, name, url)
            if allow_stores is None and not found.access_key and not found.machine_role:
                what = f"The credentials {name!r} have no S3 keys"
                raise ConfigError(what, f"credentials.{name}", "Set access_key and secret_key, or machine_role")
        return {key: _revealed(value) for key, value in found if key in _S3_VALUES}


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
