"""Turns settings into working parts: the one place that names concrete classes.

SDKs are imported when a part is first wanted, so that ``ssvm list`` of a directory does not wait for vSphere's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from .addresses import AddressRule
from .credentials import authorization, named_credentials
from .digest import Digest
from .errors import InvalidRequest, ObjectNotFound
from .jobs import Job, find_job
from .jobs.attempt import Attempt, Limits, Progress, RemoteSource
from .jobs.request import parse_request, redact
from .jobs.retention import Rule, Rules
from .links import Signer, local_key
from .pace import Pace
from .quota import Limits as Quotas
from .quota import Quota
from .settings import Keep as KeepSettings
from .settings import Section, Settings
from .slots import Slots
from .stores import open_destination, open_origin, open_store, sweep_destination
from .stream import Check, Sink, Source, Store
from .verdicts import Verdicts

if TYPE_CHECKING:
    from .ledger import Ledger, NewJob, Record
    from .ledger.events import Events
    from .ledger.figures import Figures
    from .ledger.links import LinkBook
    from .ledger.registry import Registry
    from .origins import Origins
    from .stores.nfs_mount import Mounted


#: Made when the worker starts, so that its processes share it.
_PACE = Pace()


class Stores(Mapping[str, Store]):
    """The image stores of the settings by name, each opened when it is first asked for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened: dict[str, Store] = {}

    def __getitem__(self, name: str) -> Store:
        if name not in self._opened:
            self._opened[name] = _open(name, self._settings)
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
        raise InvalidRequest(f"There is no image store named {name!r}", "stores", f"There are: {', '.join(stores)}")
    return stores[name]


def _open(name: str, settings: Settings) -> Store:
    store = settings.stores[name]
    if store.url.startswith("nfs://"):
        return open_store(name, store.url, **_nfs_values(settings))
    values = {key: _revealed(value) for key, value in store if key not in ("url", "backup_mode")}
    return open_store(name, store.url, **values)


def _nfs_values(settings: Settings) -> dict[str, Any]:
    nfs = settings.nfs
    return {**_given(nfs), "mount_root": nfs.mount_root or settings.state_dir / "nfs"}


def nfs_mounts(settings: Settings) -> list[Mounted]:
    """The mounts of all stores on NFS, one each for those that share one; nothing is mounted yet."""
    from .stores.nfs import NfsStore

    opened = Stores(settings)
    stores = [opened[name] for name, each in settings.stores.items() if each.url.startswith("nfs://")]
    found = {each.mounted.places.slug: each.mounted for each in stores if isinstance(each, NfsStore)}
    return list(found.values())


def _bucket(url: str) -> str:
    """The bucket of an s3:// URL; empty for any other."""
    return urlsplit(url).netloc if url.startswith("s3://") else ""


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
class Outside:
    """Opens what lies outside the stores, by the settings: the ``Doors`` of an attempt."""

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
        headers = {**headers, **authorization(named_credentials(self.settings, credentials))}
        return open_destination(url, size, owner=attempt.owner, headers=headers, check=attempt.check, **values)

    def sweep_destination(self, url: str, *, credentials: str | None) -> None:
        """Abort uploads that dead attempts have left open there."""
        sweep_destination(url, **self._s3_values(url, credentials))

    def vcenter(self, name: str, *, check: Check) -> Any:
        """A session with that vCenter; a context manager."""
        from .vmware.session import Address, Options, Session

        if name not in self.settings.vcenters:
            known = ", ".join(self.settings.vcenters) or "none"
            raise InvalidRequest(f"There is no vCenter named {name!r}", "vcenters", f"The settings have: {known}")
        values = {key: _revealed(value) for key, value in self.settings.vcenters[name]}
        options = {"spill_dir": self.settings.state_dir / "spill", **_given(self.settings.backup)}
        return Session(Address(**values), check, Options(**options))

    def _origins(self) -> Origins:
        from .origins import Origins

        return Origins(self.settings, lambda name: open_store_named(self.settings, name), self._s3_origin)

    def _s3_origin(self, url: str, credentials: str | None) -> Source:
        """Without keys nothing is signed: a stranger's URL must not be read by the keys of our stores or machine."""
        values = self._s3_values(url, credentials) if credentials else {}
        return open_origin(url, **values, anonymous=not values.get("access_key"))

    def _upload_values(self) -> dict[str, Any]:
        upload = self.settings.upload
        rule = AddressRule(upload.allow_networks) if upload.allow_networks else None
        return {"rule": rule, "http_ca_file": str(upload.ca_file) if upload.ca_file else None}

    def _s3_values(self, url: str, name: str | None) -> dict[str, Any]:
        """Endpoint and keys by that name; without one those of the store that is in the same bucket, if there is one.

        Else nothing, and the SDK looks for itself: environment, instance role.
        """
        stores = self.settings.stores
        if name in stores:
            found: Any = stores[name]
        elif name is not None:
            found = named_credentials(self.settings, name)
        else:
            found = next((each for each in stores.values() if _bucket(each.url) == _bucket(url)), None)
        wanted = ("endpoint", "region", "access_key", "secret_key", "ca_file")
        return {key: _revealed(value) for key, value in found if key in wanted} if found and _bucket(url) else {}


def make_attempt(
    settings: Settings,
    job_id: str,
    *,
    publish: Callable[[dict[str, Any]], None] | None = None,
    **given: Any,
) -> Attempt:
    """An attempt at a job with everything that it may touch; *given* are further fields of ``Attempt``."""
    download = settings.download
    names = ("max_bytes", "max_virtual_size", "max_ratio", "max_rate", "resumes", "scratch_dir")
    limits = Limits(**{name: getattr(download, name) for name in names})
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
    return Attempt(job_id, Stores(settings), Outside(settings), limits=limits, progress=progress, **given)


def broker_url(settings: Settings) -> str:
    """Where the broker is; an embedded one is found by the file that its worker left in state_dir."""
    if settings.broker.embedded:
        from .ledger.embedded import url_of

        return url_of(settings.state_dir)
    return settings.broker.url.get_secret_value()


def open_ledger(settings: Settings) -> Ledger:
    """The ledger of jobs; a context manager."""
    from .ledger import Ledger

    ledger = settings.ledger
    keep_s = ledger.keep_days * 24 * 3600
    return Ledger(broker_url(settings), prefix=settings.broker.prefix, claim_s=ledger.claim_s, keep_s=keep_s)


@dataclass(frozen=True)
class RecordedJobs:
    """What the ledger knows of all jobs; each call connects anew, for few jobs ask."""

    settings: Settings

    def live(self) -> Collection[str]:
        with open_ledger(self.settings) as ledger:
            return ledger.live()

    @contextmanager
    def hold(self, resource: str) -> Iterator[Callable[[], None] | None]:
        """A job of its own in the ledger, already claimed; should we die, a worker goes on with it."""
        request = {"volume": resource}
        with open_ledger(self.settings) as ledger:
            new = new_job(self.settings, find_job("cleanup"), request, default_id=f"cleanup-{uuid.uuid4().hex[:12]}")
            with ledger.holding(new, f"{socket.gethostname()}:{os.getpid()}") as confirm:
                yield confirm

    def ended(self, job_id: str) -> bool:
        with open_ledger(self.settings) as ledger:
            try:
                return ledger.get(job_id).ended
            except ObjectNotFound:
                return False

    def expired(self) -> int:
        with open_ledger(self.settings) as ledger:
            return ledger.expired()

    def expire(self) -> int:
        with open_ledger(self.settings) as ledger:
            return ledger.expire()


def end_links(settings: Settings, dry_run: bool) -> int:
    """Forget links that have ended, and cancel uploads that wait for more by them; returns how many there were."""
    from .ledger.uploads import end_links as end

    with open_ledger(settings) as ledger, contextlib.closing(open_links(settings)) as book:
        return len(book.gone()) if dry_run else end(ledger, book)


def open_slots(settings: Settings) -> Slots:
    """The slots that all workers of the broker share; nothing is connected yet."""
    from .ledger.slots import SharedSlots

    return SharedSlots(broker_url(settings), prefix=settings.broker.prefix, claim_s=settings.ledger.claim_s)


def open_verdicts(settings: Settings) -> Verdicts:
    """What reading artifacts again has found, for all workers; nothing is connected yet."""
    from .ledger.verdicts import SharedVerdicts

    return SharedVerdicts(broker_url(settings), prefix=settings.broker.prefix)


def open_quota(settings: Settings) -> Quota:
    """What accounts have stored, for all workers; nothing is connected yet."""
    from .ledger.quota import SharedQuota

    return SharedQuota(broker_url(settings), prefix=settings.broker.prefix, claim_s=settings.ledger.claim_s)


def quota_limits(settings: Settings) -> Quotas:
    """What accounts may store, by the settings."""
    return Quotas(settings.quota.default, settings.quota.accounts)


def retention_rules(settings: Settings) -> Rules:
    """Which backups are kept, by the settings."""
    names = ("keep_last", "keep_daily", "keep_weekly", "keep_monthly")

    def rule(section: KeepSettings) -> Rule:
        return Rule(**{name: getattr(section, name) for name in names})

    given = settings.retention
    tables = [{name: rule(each) for name, each in table.items()} for table in (given.accounts, given.volumes)]
    return Rules(rule(given), *tables)


def open_registry(settings: Settings) -> Registry:
    """The workers that the broker has heard of; nothing is connected yet."""
    from .ledger.registry import Registry

    return Registry(broker_url(settings), prefix=settings.broker.prefix)


def open_figures(settings: Settings) -> Figures:
    """What the ledger counts; nothing is connected yet."""
    from .ledger.figures import Figures

    return Figures(broker_url(settings), prefix=settings.broker.prefix)


def open_events(settings: Settings) -> Events:
    """The stream of what happens to jobs; nothing is connected yet."""
    from .ledger.events import Events

    return Events(broker_url(settings), prefix=settings.broker.prefix)


def open_links(settings: Settings) -> LinkBook:
    """The book of links; nothing is connected yet."""
    from .ledger.links import LinkBook

    return LinkBook(broker_url(settings), prefix=settings.broker.prefix)


def link_signer(settings: Settings) -> Signer:
    """Signs and checks links by the keys of the settings; without any by one of this machine, made when first wanted.

    Raises ConfigError for a key that there is not, or that cannot be made.
    """
    given = settings.serve
    if given.keys or given.key:
        return Signer({name: key.secret.get_secret_value() for name, key in given.keys.items()}, given.key or "")
    return Signer({"local": local_key(settings.state_dir / "link-key")}, "local")


def new_job(settings: Settings, job: Job, data: Any, *, default_id: str = "", zone: str = "") -> NewJob:
    """A request object as the ledger takes it; InvalidRequest lists all that is wrong with it.

    Its id is the request's own, else *default_id*, else one that is made up. Defaults are left out, so that the same
    request is recognised whichever of them its sender spelt out.
    """
    from .ledger import NewJob

    request = parse_request(job.Request, data, job.name)
    job_id = request.job_id or default_id or uuid.uuid4().hex
    return NewJob(
        job_id=job_id,
        job=job.name,
        zone=zone or settings.zone,
        lane=job.lane,
        request=request.model_dump(mode="json", exclude_defaults=True) | {"job_id": job_id},
        resource=job.resource(request),
        callback_url=request.callback_url,
    )


def shown(record: Record) -> dict[str, Any]:
    """A job's record as people and programs may see it: no secrets."""
    values = record.to_dict()
    return values | {"request": redact(values["request"])}
