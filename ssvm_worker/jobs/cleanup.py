"""Remove what dead jobs have left: writes, artifacts without a manifest, drafts, snapshots, old records."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pydantic import Field, field_validator

from ssvm_worker.errors import Cancelled, InvalidRequest, WorkerError
from ssvm_worker.keys import DRAFT, MANIFEST, PACKS, Artifact
from ssvm_worker.manifest import find_manifest
from ssvm_worker.stream import Store, StoredObject
from ssvm_worker.units import human_duration, parse_duration

from .attempt import Attempt
from .leftovers import remove_snapshots
from .request import JobRequest

#: Findings that are told one by one; more are only counted.
_TOLD = 1000
#: How many names a place has that one artifact's objects lie in.
_DEPTHS = {"template": 4, "volumes": 3, "snapshots": 4}


class Request(JobRequest):
    """How long a thing must have been left alone, on all stores."""

    older_than: str = Field("24h", description="How long nobody has touched it: a number with s, m, h or d")
    dry_run: bool = Field(False, description="Only tell what would go, and why")

    @field_validator("older_than")
    @classmethod
    def _duration(cls, value: str) -> str:
        parse_duration(value)
        return value


def resource(request: Request) -> str:  # noqa: ARG001 - every job answers
    """Nothing is written, and two clean-ups at once do no harm: what one has removed, the other does not find."""
    return ""


def discard(request: Request, attempt: Attempt) -> None:
    """Nothing was written."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Look through all stores and vCenters; what is young, or of a job that is queued or runs, is never touched.

    A store or vCenter that fails is told as ``failed`` and costs the others nothing. Raises StoreUnavailable, and has
    touched nothing, when the ledger cannot say which jobs live.
    """
    attempt.jobs.live()
    failed: dict[str, Any] = {}
    cleaning = _Cleaning(attempt, parse_duration(request.older_than), request.dry_run)
    for name in attempt.stores:
        attempt.progress.start(f"clean up {name}")
        try:
            _Place(cleaning, attempt.store(name)).clean()
        except Cancelled:
            raise
        except WorkerError as error:
            attempt.log.warning("store %s is not cleaned up: %s", name, error)
            failed[name] = error.as_dict()
    for name in attempt.vcenters:
        attempt.progress.start(f"clean up {name}")
        try:
            cleaning.add(remove_snapshots(attempt, name, cleaning.older_than_s, request.dry_run))
        except Cancelled:
            raise
        except WorkerError as error:
            attempt.log.warning("vCenter %s is not cleaned up: %s", name, error)
            failed[name] = error.as_dict()
    return cleaning.result() | {"records": _records(request, attempt), "failed": failed}


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
    now: float = field(default_factory=time.time)
    counts: Counter[str] = field(default_factory=Counter)
    size: int = 0
    found: list[dict[str, Any]] = field(default_factory=list)

    def is_old(self, each: StoredObject) -> bool:
        """Whether nobody has touched it for long enough; a time of 0 takes all."""
        return not self.older_than_s or each.when <= self.now - self.older_than_s

    def is_dead(self, place: str) -> bool:
        """Whether no job that is queued or runs may write there; asked right before each removal."""
        self.attempt.check()
        names = place.split("/")
        above = {"/".join(names[:depth]) for depth in range(1, len(names) + 1)}
        return above.isdisjoint(self.attempt.jobs.live())

    def note(self, store: Store, what: str, where: str, of: list[StoredObject]) -> None:
        """One more thing that goes."""
        size, age = sum(each.size for each in of), self.now - max(each.when for each in of)
        why = f"untouched for {human_duration(max(0.0, age))}, and no job is at work there"
        self.counts[what] += 1
        self.size += size
        if len(self.found) < _TOLD:
            told = {"store": store.name, "what": what, "where": where, "objects": len(of), "bytes": size, "why": why}
            self.found.append(told)
        self.attempt.log.info("%s %s:%s: %s", "would remove" if self.dry_run else "removing", store.name, where, why)

    def add(self, found: list[dict[str, Any]]) -> None:
        """Things that went elsewhere."""
        self.counts.update(each["what"] for each in found)
        self.found += found[: max(0, _TOLD - len(self.found))]

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

    def clean(self) -> None:
        writes: dict[str, list[StoredObject]] = {}
        for each in self.store.leftovers():
            if place := _place_of(each.key):
                writes.setdefault(place, []).append(each)
        for place, found in writes.items():
            self._abandoned(place, found)
        for place, objects in groupby(self.store.list(), lambda each: _place_of(each.key)):
            if place and not place.endswith(f"/{PACKS}"):  # packs go with the backups that need them
                self._artifact(place, list(objects))

    def _abandoned(self, place: str, found: list[StoredObject]) -> None:
        old = [each for each in found if self.cleaning.is_old(each)]
        if young := [each for each in found if each not in old]:
            self.young[place] = young
        if old and self.cleaning.is_dead(place):
            for each in old:
                self.cleaning.note(self.store, "abandoned write", each.key, [each])
            if not self.cleaning.dry_run:
                self.store.sweep(self.cleaning.older_than_s, place)

    def _artifact(self, place: str, objects: list[StoredObject]) -> None:
        names = {each.key.removeprefix(f"{place}/") for each in objects}
        if MANIFEST not in names:
            self._incomplete(place, objects)
        elif DRAFT in names:
            self._draft(place, [each for each in objects if each.key == f"{place}/{DRAFT}"])

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


def _place_of(key: str) -> str:
    """The prefix of the artifact that an object belongs to, or the place of a volume's packs; "" for another's."""
    names = key.split("/")
    depth = _DEPTHS.get(names[0], 0)
    place = "/".join(names[:depth])
    if not depth or len(names) <= depth:
        return ""
    try:
        return place if names[depth - 1] == PACKS else Artifact.of_prefix(place).prefix
    except InvalidRequest:
        return ""
