"""Remove what dead jobs have left, backups that no rule keeps, what no backup needs, and old records."""

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
from ssvm_worker.jobs.backup.old_snapshots import remove_snapshots
from ssvm_worker.jobs.request import JobRequest
from ssvm_worker.jobs.verify.screenshots import remove_screenshots
from ssvm_worker.streaming.interfaces import Store, StoredObject
from ssvm_worker.units import human_duration, parse_duration

from .volume import Volume

#: Findings that are told one by one; more are only counted.
_TOLD = 1000


class Request(JobRequest):
    """How long a thing must have been left alone, on all stores."""

    older_than: str = Field("24h", description="How long nobody has touched it: a number with s, m, h, d or w")
    dry_run: bool = Field(False, description="Only tell what would go, and why")
    volume: str = Field("", description="Only the backups and packs of this one, snapshots/ACCOUNT/VOLUME")

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
    """Two clean-ups at once do no harm: what one has removed, the other does not find. A volume's holds it."""
    return request.volume


def discard(request: Request, attempt: Attempt) -> None:
    """Nothing was written."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Look through all stores and vCenters; what is young, or of a job that is queued or runs, is never touched.

    A store or vCenter that fails is told as ``failed`` and costs the others nothing. Raises StoreUnavailable, and has
    touched nothing, when the ledger cannot say which jobs live.
    """
    failed: dict[str, Any] = {}
    links = attempt.end_links(request.dry_run)  # first: what waited for more by them is abandoned now
    live = attempt.jobs.live()
    cleaning = _Cleaning(attempt, parse_duration(request.older_than), request.dry_run, request.volume, live=live)
    for name in attempt.stores:
        attempt.progress.start(f"clean up {name}")
        try:
            _Place(cleaning, attempt.store(name)).clean(request.volume)
        except Cancelled:
            raise
        except WorkerError as error:
            attempt.log.warning("store %s is not cleaned up: %s", name, error)
            failed[name] = error.as_dict()
    for name in () if request.volume else attempt.vcenters:
        attempt.progress.start(f"clean up {name}")
        try:
            cleaning.add(remove_snapshots(attempt, name, cleaning.older_than_s, request.dry_run))
        except Cancelled:
            raise
        except WorkerError as error:
            attempt.log.warning("vCenter %s is not cleaned up: %s", name, error)
            failed[name] = error.as_dict()
    cleaning.add(remove_screenshots(attempt, request.volume, dry_run=request.dry_run))
    return cleaning.result() | {"records": _records(request, attempt), "links": links, "failed": failed}


def _records(request: Request, attempt: Attempt) -> int:
    """How many records of the ledger are past retention; they go."""
    if request.dry_run:
        return attempt.jobs.expired()
    count = 0
    while gone := attempt.jobs.expire():
        count += gone
    return count


@dataclass
class _Cleaning:
    """What is found on all stores."""

    attempt: Attempt
    older_than_s: float
    dry_run: bool
    #: The only one whose lock this attempt has, and may need.
    volume: str = ""
    #: What jobs may write, as it was when the clean-up began.
    live: Collection[str] = ()
    now: float = field(default_factory=time.time)
    counts: Counter[str] = field(default_factory=Counter)
    size: int = 0
    found: list[dict[str, Any]] = field(default_factory=list)

    def is_old(self, each: StoredObject) -> bool:
        """Whether nobody has touched it for long enough; a time of 0 takes all."""
        return not self.older_than_s or each.modified <= self.now - self.older_than_s

    def is_dead(self, place: str) -> bool:
        """Whether no job that is queued or runs may write there, now. Reads the ledger only for what may go."""
        self.attempt.check()
        return _is_dead(place, self.live) and _is_dead(place, self.attempt.jobs.live())

    def note(self, store: Store, what: str, where: str, of: list[StoredObject], why: str = "") -> None:
        """One more thing that goes."""
        size, age = sum(each.size for each in of), self.now - max((each.modified for each in of), default=self.now)
        why = why or f"untouched for {human_duration(max(0.0, age))}, and no job is at work there"
        self.counts[what] += 1
        self.size += size
        if len(self.found) < _TOLD:
            told = {"store": store.name, "what": what, "where": where, "objects": len(of), "bytes": size, "why": why}
            self.found.append(told)
        self.attempt.log.info("%s %s:%s: %s", "would remove" if self.dry_run else "removing", store.name, where, why)

    def add(self, found: list[dict[str, Any]]) -> None:
        """Things that went elsewhere."""
        self.counts.update(each["what"] for each in found)
        self.size += sum(each["bytes"] for each in found)
        self.found += found[: max(0, _TOLD - len(self.found))]

    @cached_property
    def damaged(self) -> dict[str, set[str]]:
        """Places of artifacts that are known to be damaged, by store."""
        found: dict[str, set[str]] = {}
        for each in self.attempt.verdicts.findings():
            found.setdefault(each.store, set()).add(each.place)
        return found

    def hold(self, family: str) -> AbstractContextManager[Callable[[], None] | None]:
        """The lock of a volume, unless the claim of this very job is that."""
        return nullcontext(self.attempt.confirm) if self._own(family) else self.attempt.jobs.hold(family)

    def may_touch(self, family: str) -> bool:
        """Whether no other job could write there, or read a backup of it, when the clean-up began."""
        self.attempt.check()
        return not _is_read(family, self.live) and (self._own(family) or _is_dead(family, self.live))

    def may_still_touch(self, family: str) -> bool:
        """Whether no job reads a backup of the volume, now; its lock, which is held, keeps those away that write."""
        return not _is_read(family, self.attempt.jobs.live())

    def _own(self, family: str) -> bool:
        return family == self.volume and self.attempt.token > 0

    def result(self) -> dict[str, Any]:
        """What was removed, or would be."""
        return {"dry_run": self.dry_run, "counts": dict(self.counts), "bytes": self.size, "found": self.found}


@dataclass
class _Place:
    """One store. Holds what is listed of one artifact, and of all uncommitted writes."""

    cleaning: _Cleaning
    store: Store
    #: Writes that are too young to go, by place.
    young: dict[str, list[StoredObject]] = field(default_factory=dict)

    def clean(self, volume: str) -> None:
        """Look through all of it, or through the backups and packs of one volume."""
        if not volume:
            self._writes()
        listed = self.store.list(volume)
        for family, objects in groupby(listed, lambda each: _family_of(each.key)):
            found = Volume(self.cleaning.attempt, self.store, family)
            for place, of in groupby(objects, lambda each: place_of(each.key)):
                if place.endswith(f"/{PACKS}"):
                    found.packed = max(each.modified for each in of)
                elif place and self._artifact(place, list(of)) and family:
                    found.backups.append(Artifact.of_prefix(place))
            if family:
                self._volume(found)

    def _writes(self) -> None:
        writes: dict[str, list[StoredObject]] = {}
        for each in self.store.leftovers():
            if place := place_of(each.key):
                writes.setdefault(place, []).append(each)
        for place, found in writes.items():
            self._abandoned(place, found)

    def _volume(self, found: Volume) -> None:
        """Backups past retention and packs past use: looked for, and once more under the lock before they go."""
        at_work = any(place.startswith(f"{found.family}/") for place in self.young)
        if at_work or not self.cleaning.may_touch(found.family) or not self._goes(found):
            return
        if self.cleaning.dry_run:
            self._tell(found)
            return
        with self.cleaning.hold(found.family) as confirm:
            if confirm is None or not self.cleaning.may_still_touch(found.family):
                self.cleaning.attempt.log.info("%s waits for the next clean-up: a job is at work there", found.family)
                return
            expired = self._tell(found)
            held = replace(self.cleaning.attempt, confirm=confirm)
            try:
                found.remove(expired, held)
            except Cancelled as error:
                if error.reason != "fenced":
                    raise
                # The lock was lost, and with it the job that held it goes to a worker; if we are lost, check() says so.
                self.cleaning.attempt.log.warning("%s is left to a worker: its lock was lost", found.family)

    def _goes(self, found: Volume) -> bool:
        return bool(found.expired(self._damaged) or self._free(found))

    def _free(self, found: Volume) -> list[StoredObject]:
        """A pack that is young may be of a backup that is being made where no ledger knows of it; then none goes."""
        old = self.cleaning.is_old(StoredObject("", 0, modified=found.packed))
        return found.free() if old else []

    def _tell(self, found: Volume) -> list[Manifest]:
        """Note what goes of a volume; returns the backups."""
        expired = found.expired(self._damaged)
        for manifest, why in expired:
            of = [StoredObject(manifest.artifact.key(each.name), each.size) for each in manifest.entries]
            self.cleaning.note(self.store, "expired backup", manifest.artifact.prefix, of, why)
        for each in self._free(found):
            self.cleaning.note(self.store, "unneeded pack", each.key, [each], "no backup of the volume needs it")
        return [manifest for manifest, _ in expired]

    @property
    def _damaged(self) -> set[str]:
        return self.cleaning.damaged.get(self.store.name, set())

    def _abandoned(self, place: str, found: list[StoredObject]) -> None:
        old = [each for each in found if self.cleaning.is_old(each)]
        if young := [each for each in found if each not in old]:
            self.young[place] = young
        if old and self.cleaning.is_dead(place):
            for each in old:
                self.cleaning.note(self.store, "abandoned write", each.key, [each])
            if not self.cleaning.dry_run:
                self.store.sweep(self.cleaning.older_than_s, place)

    def _artifact(self, place: str, objects: list[StoredObject]) -> bool:
        """Whether it is complete."""
        names = {each.key.removeprefix(f"{place}/") for each in objects}
        if MANIFEST not in names:
            self._incomplete(place, objects)
        elif DRAFT in names:
            self._draft(place, [each for each in objects if each.key == f"{place}/{DRAFT}"])
        return MANIFEST in names

    def _incomplete(self, place: str, objects: list[StoredObject]) -> None:
        if place in self.young or not all(map(self.cleaning.is_old, objects)) or not self.cleaning.is_dead(place):
            return
        if find_manifest(self.store, Artifact.of_prefix(place)) is None:
            self.cleaning.note(self.store, "incomplete artifact", place, objects)
            self._delete(objects)

    def _draft(self, place: str, draft: list[StoredObject]) -> None:
        """A job that was killed between its manifest and its draft leaves that one."""
        if self.cleaning.is_old(draft[0]) and self.cleaning.is_dead(place):
            self.cleaning.note(self.store, "draft", draft[0].key, draft)
            self._delete(draft)

    def _delete(self, objects: list[StoredObject]) -> None:
        if not self.cleaning.dry_run:
            for each in objects:
                self.store.delete(each.key)


def _is_dead(place: str, live: Collection[str]) -> bool:
    names = place.split("/")
    return not any("/".join(names[:depth]) in live for depth in range(1, len(names) + 1))


def _is_read(family: str, live: Collection[str]) -> bool:
    return any(each.startswith(f"{family}/") for each in live)


def _family_of(key: str) -> str:
    """The place of the volume whose backup or pack an object belongs to; "" for any other."""
    place = place_of(key)
    return place.rpartition("/")[0] if place.startswith("snapshots/") else ""
