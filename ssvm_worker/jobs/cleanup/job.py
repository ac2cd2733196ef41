"""Remove leftovers of ended jobs, backups past retention, unneeded packs, and old records."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from pydantic import Field, field_validator

from ssvm_worker.artifacts.layout import DRAFT, MANIFEST, PACKS, Artifact, place_of
from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.errors import Cancelled, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import JobRequest
from ssvm_worker.jobs.verify.screenshots import remove_screenshots
from ssvm_worker.streaming.interfaces import Store, StoredObject
from ssvm_worker.units import DURATION, human_duration, parse_duration

from .snapshots import remove_snapshots
from .volume import Volume

#: The most findings in the result. Further findings are only counted.
_MAX_LISTED = 1000


class Request(JobRequest):
    """The age of the things to remove, on all stores."""

    older_than: str = Field(
        "24h",
        description="The time since the last change: a number with s, m, h, d or w",
        json_schema_extra={"pattern": DURATION},
    )
    dry_run: bool = Field(False, description="Only report what would be removed, and why")
    volume: str = Field("", description="Only the backups and packs of this volume: snapshots/ACCOUNT/VOLUME")

    @field_validator("volume")
    @classmethod
    def _place(cls, value: str) -> str:
        names = value.split("/")
        if value and (names[0] != "snapshots" or len(names) != 3 or not _family_of(f"{value}/any/x")):
            raise ValueError("must be snapshots/ACCOUNT/VOLUME")
        return value

    @field_validator("older_than")
    @classmethod
    def _duration(cls, value: str) -> str:
        parse_duration(value)
        return value


def resource(request: Request) -> str:
    """Return the volume of the request, which the job locks. Clean-ups of everything may run at the same time.

    Two such clean-ups do no harm: each of them ignores what the other has removed.
    """
    return request.volume


def discard(request: Request, attempt: Attempt) -> None:
    """Do nothing: this job writes no artifact."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Check all stores and vCenters. Never remove young objects, or objects of a queued or running job.

    The result lists failed stores and vCenters as ``failed``. They do not stop the clean-up of the others.
    If the ledger cannot list the live jobs, this raises StoreUnavailable and removes nothing.
    """
    failed: dict[str, Any] = {}
    links = attempt.services.end_links(request.dry_run)  # first, because this abandons the uploads of expired links
    live = attempt.services.jobs.live()
    cleaning = _Cleaning(attempt, parse_duration(request.older_than), request.dry_run, request.volume, live=live)

    for name in attempt.stores:
        attempt.progress.start(f"clean up {name}")
        try:
            _StoreCleaning(cleaning, attempt.store(name)).clean(request.volume)
        except Cancelled:
            raise
        except WorkerError as error:
            attempt.log.warning("store %s is not cleaned up: %s", name, error)
            failed[name] = error.as_dict()
    for name in () if request.volume else attempt.settings.vcenters:
        attempt.progress.start(f"clean up {name}")
        removed: list[dict[str, Any]] = []
        try:
            remove_snapshots(attempt, name, cleaning.older_than_s, request.dry_run, removed)
        except Cancelled:
            raise
        except WorkerError as error:
            attempt.log.warning("vCenter %s is not cleaned up: %s", name, error)
            failed[name] = error.as_dict()
        cleaning.add(removed)
    cleaning.add(remove_screenshots(attempt, request.volume, dry_run=request.dry_run))
    return {
        "dry_run": request.dry_run,
        "counts": dict(cleaning.counts),
        "bytes": cleaning.size,
        "found": cleaning.found,
        "records": _expire_records(request, attempt),
        "links": links,
        "failed": failed,
    }


def _expire_records(request: Request, attempt: Attempt) -> int:
    """Delete the ledger's records past retention. Return their number."""
    if request.dry_run:
        return attempt.services.jobs.expired()
    count = 0
    while expired := attempt.services.jobs.expire():
        count += expired
    return count


@dataclass
class _Cleaning:
    """The options and findings of the clean-up of all stores."""

    attempt: Attempt
    older_than_s: float
    dry_run: bool
    #: The volume that this job has locked, and the only one that the clean-up may change. "" for all volumes.
    volume: str = ""
    #: The resources that jobs might write when the clean-up began.
    live: Collection[str] = ()
    now: float = field(default_factory=time.time)
    counts: Counter[str] = field(default_factory=Counter)
    size: int = 0
    found: list[dict[str, Any]] = field(default_factory=list)

    def is_old(self, each: StoredObject) -> bool:
        """Return whether the object has not changed for long enough. An age of 0 accepts every object."""
        return not self.older_than_s or each.modified <= self.now - self.older_than_s

    def is_dead(self, prefix: str) -> bool:
        """Return whether no queued or running job may write below *prefix* now.

        This reads the ledger again, but only if no job could write there when the clean-up began.
        """
        self.attempt.check()
        return _is_dead(prefix, self.live) and _is_dead(prefix, self.attempt.services.jobs.live())

    def record(self, store: Store, what: str, where: str, objects: list[StoredObject], why: str = "") -> None:
        """Record one finding, and log it."""
        size = sum(each.size for each in objects)
        age = self.now - max((each.modified for each in objects), default=self.now)
        why = why or f"untouched for {human_duration(max(0.0, age))}, and no job uses it"
        self.counts[what] += 1
        self.size += size
        if len(self.found) < _MAX_LISTED:
            finding = {"store": store.name, "what": what, "where": where, "objects": len(objects), "bytes": size}
            self.found.append(finding | {"why": why})
        self.attempt.log.info("%s %s:%s: %s", "would remove" if self.dry_run else "removing", store.name, where, why)

    def add(self, found: list[dict[str, Any]]) -> None:
        """Add findings outside the stores."""
        self.counts.update(each["what"] for each in found)
        self.size += sum(each["bytes"] for each in found)
        self.found += found[: max(0, _MAX_LISTED - len(self.found))]

    @cached_property
    def damaged(self) -> dict[str, set[str]]:
        """Return the prefixes of the damaged artifacts, by store."""
        found: dict[str, set[str]] = {}
        for each in self.attempt.services.scrub_results.findings():
            found.setdefault(each.store, set()).add(each.place)
        return found

    def hold(self, family: str) -> AbstractContextManager[Callable[[], None] | None]:
        """Lock a volume, unless this job holds its lock already. See ``Jobs.hold``."""
        return nullcontext(self.attempt.confirm) if self._is_own(family) else self.attempt.services.jobs.hold(family)

    def may_change(self, family: str) -> bool:
        """Return whether no other job could write the volume, or read a backup of it, when the clean-up began."""
        self.attempt.check()
        return not _is_read(family, self.live) and (self._is_own(family) or _is_dead(family, self.live))

    def _is_own(self, family: str) -> bool:
        return family == self.volume and self.attempt.token > 0


@dataclass
class _StoreCleaning:
    """The clean-up of one store. Memory: the objects of one artifact, and all uncommitted writes."""

    cleaning: _Cleaning
    store: Store
    #: The uncommitted writes that are too young to remove, by prefix.
    young: dict[str, list[StoredObject]] = field(default_factory=dict)

    def clean(self, volume: str) -> None:
        """Clean up the whole store, or the backups and packs of one volume.

        On a store of a CloudStack management server this removes abandoned writes only.
        """
        if not volume:
            self._sweep_writes()
        if self.cleaning.attempt.settings.is_of_cloudstack(self.store.name):
            # Hypervisors and the Java agent write without manifests, and the server decides about retention.
            return
        for family, objects in groupby(self.store.list(volume), lambda each: _family_of(each.key)):
            found = Volume(self.cleaning.attempt, self.store, family)
            for prefix, members in groupby(objects, lambda each: place_of(each.key)):
                if prefix.endswith(f"/{PACKS}"):
                    found.packed = max(each.modified for each in members)
                elif prefix and self._is_complete(prefix, list(members)) and family:
                    found.backups.append(Artifact.of_prefix(prefix))
            if family:
                self._clean_volume(found)

    def _sweep_writes(self) -> None:
        """Remove abandoned uncommitted writes."""
        writes: dict[str, list[StoredObject]] = {}
        for each in self.store.leftovers():
            if prefix := place_of(each.key):
                writes.setdefault(prefix, []).append(each)
        for prefix, found in writes.items():
            old = [each for each in found if self.cleaning.is_old(each)]
            if young := [each for each in found if each not in old]:
                self.young[prefix] = young
            if old and self.cleaning.is_dead(prefix):
                for each in old:
                    self.cleaning.record(self.store, "abandoned write", each.key, [each])
                if not self.cleaning.dry_run:
                    self.store.sweep(self.cleaning.older_than_s, prefix)

    def _clean_volume(self, volume: Volume) -> None:
        """Remove backups past retention and unneeded packs. Check both again under the volume's lock."""
        cleaning = self.cleaning
        has_writer = any(prefix.startswith(f"{volume.family}/") for prefix in self.young)
        if has_writer or not cleaning.may_change(volume.family):
            return
        if not volume.expired(self._damaged) and not self._free_packs(volume):
            return
        if cleaning.dry_run:
            self._record_volume(volume)
            return
        with cleaning.hold(volume.family) as confirm:
            # The lock excludes jobs that write the volume, but not jobs that read a backup of it.
            if confirm is None or _is_read(volume.family, cleaning.attempt.services.jobs.live()):
                cleaning.attempt.log.info("%s waits for the next clean-up: a job uses the volume", volume.family)
                return
            expired = self._record_volume(volume)
            try:
                volume.remove(expired, replace(cleaning.attempt, confirm=confirm))
            except Cancelled as error:
                if error.reason != "fenced":
                    raise
                # The volume's lock was lost. A worker continues the job that held it. If this attempt has lost its own
                # claim too, the next check() raises.
                cleaning.attempt.log.warning("%s is left to another worker: its lock was lost", volume.family)

    def _free_packs(self, volume: Volume) -> list[StoredObject]:
        """Return the packs that no backup needs.

        Return none if a pack is young: a backup that no ledger knows may have written it.
        """
        old = self.cleaning.is_old(StoredObject("", 0, modified=volume.packed))
        return volume.free() if old else []

    def _record_volume(self, volume: Volume) -> list[Manifest]:
        """Record the backups past retention and the unneeded packs. Return these backups."""
        expired = volume.expired(self._damaged)
        for manifest, why in expired:
            objects = [StoredObject(manifest.artifact.key(each.name), each.size) for each in manifest.entries]
            self.cleaning.record(self.store, "expired backup", manifest.artifact.prefix, objects, why)
        for each in self._free_packs(volume):
            self.cleaning.record(self.store, "unneeded pack", each.key, [each], "no backup of the volume needs it")
        return [manifest for manifest, _ in expired]

    @property
    def _damaged(self) -> set[str]:
        return self.cleaning.damaged.get(self.store.name, set())

    def _is_complete(self, prefix: str, objects: list[StoredObject]) -> bool:
        """Return whether the artifact is complete. Remove an incomplete artifact, and the draft of a complete one.

        A job that was killed between its manifest and its draft leaves the draft.
        """
        draft = [each for each in objects if each.key == f"{prefix}/{DRAFT}"]
        complete = any(each.key == f"{prefix}/{MANIFEST}" for each in objects)
        leftovers = draft if complete else objects
        if not leftovers or not all(map(self.cleaning.is_old, leftovers)):
            return complete
        if (not complete and prefix in self.young) or not self.cleaning.is_dead(prefix):
            return complete
        if complete:
            self.cleaning.record(self.store, "draft", draft[0].key, draft)
        elif find_manifest(self.store, Artifact.of_prefix(prefix)) is None:
            self.cleaning.record(self.store, "incomplete artifact", prefix, objects)
        else:
            return complete  # a job has completed the artifact since the listing
        for each in () if self.cleaning.dry_run else leftovers:
            self.store.delete(each.key)
        return complete


def _is_dead(prefix: str, live: Collection[str]) -> bool:
    names = prefix.split("/")
    return not any("/".join(names[:depth]) in live for depth in range(1, len(names) + 1))


def _is_read(family: str, live: Collection[str]) -> bool:
    return any(each.startswith(f"{family}/") for each in live)


def _family_of(key: str) -> str:
    """Return the directory of the volume to which a backup's object or a pack belongs; "" for any other object."""
    prefix = place_of(key)
    return prefix.rpartition("/")[0] if prefix.startswith("snapshots/") else ""
