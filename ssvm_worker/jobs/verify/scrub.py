"""Reads many artifacts of a store again: all, a sample, or those first that nobody has looked at for longest."""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Manifest, artifacts_below, find_manifest
from ssvm_worker.errors import NOT_THERE, CorruptImage, Permanent
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.usage import record_usage
from ssvm_worker.streaming.interfaces import Store

from .artifact import ArtifactCheck

#: Artifacts whose times are asked for in one go.
_BATCH = 1000
#: Findings that the error tells one by one; `ssvm verify --findings` lists them all.
_TOLD = 20


@dataclass(frozen=True)
class Selection:
    """Which artifacts: exactly one of the first three is given."""

    all: bool = False
    #: A number, or a percentage.
    sample: str = ""
    oldest: int = 0
    #: Only below this place.
    prefix: str = ""


@dataclass
class Scrub:
    """One attempt at reading them."""

    attempt: Attempt
    reading: ArtifactCheck
    selection: Selection
    #: What is damaged, by artifact, as ``store:place``.
    damaged: dict[str, list[str]] = field(default_factory=dict)
    artifacts: int = 0

    def run(self, stores: list[str]) -> dict[str, Any]:
        """Read the chosen ones of each store; CorruptImage, at the end, if any is damaged."""
        size = 0
        for name in stores:
            store = self.attempt.store(name)
            self.attempt.progress.start(f"verify {name}")
            self._store(store, self._reached(name))
            size += self.attempt.progress.bytes
        if self.damaged:
            raise self._error()
        counts = {"artifacts": self.artifacts, "bytes": size, "findings": 0}
        return counts | {"stores": stores, "recorded": self.reading.recorded}

    def _store(self, store: Store, reached: str) -> None:
        started = time.time()
        for artifact in self._chosen(store):
            self.attempt.check()
            if self.selection.all and f"{artifact.prefix}/" <= f"{reached}/":
                continue
            findings = self._look(store, artifact)
            if findings is None:
                continue
            self.artifacts += 1
            self.reading.note(store, artifact, findings)
            if findings:
                self.attempt.log.warning("%s:%s is damaged: %s", store.name, artifact.prefix, "; ".join(findings))
                self.damaged[f"{store.name}:{artifact.prefix}"] = findings
        if self.selection.all and not self.selection.prefix and self.reading.recorded:
            with suppress(*NOT_THERE):  # what is away can be told nothing; the next scrub does it
                self._forget_gone(store, started)

    def _look(self, store: Store, artifact: Artifact) -> list[str] | None:
        """What is wrong with it; None if it was deleted or written anew while it was read."""
        try:
            manifest = find_manifest(store, artifact)
        except Permanent as error:
            return [f"{error.where}: {error.what}"]
        if manifest is None:
            return None
        try:
            findings = self.reading.findings(store, manifest)
        except Permanent as error:
            findings = [f"{error.where}: {error.what}"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # What the manifest says of its disks makes no sense; the artifacts behind it are read nevertheless.
            self.attempt.log.exception("%s:%s cannot be verified", store.name, artifact.prefix)
            findings = [f"{store.name}:{artifact.prefix}: its manifest contradicts itself: {type(error).__name__}"]
        if findings and not self._stands(store, manifest):
            return None
        record_usage(self.attempt, store, manifest)
        return findings

    def _stands(self, store: Store, manifest: Manifest) -> bool:
        try:
            return find_manifest(store, manifest.artifact) == manifest
        except Permanent:
            return True

    def _chosen(self, store: Store) -> Iterator[Artifact]:
        """In the order of their places; memory for those that are chosen, not for those there are."""
        listed = artifacts_below(store, self.selection.prefix)
        if self.selection.all:
            return listed
        if self.selection.oldest:
            return self._oldest(store, listed)
        return iter(sorted(self._sample(store, listed), key=lambda each: each.prefix))

    def _sample(self, store: Store, listed: Iterator[Artifact]) -> list[Artifact]:
        """Algorithm R: each has the same chance. Of a percentage the whole must be counted first."""
        wanted = self.selection.sample
        if wanted.endswith("%"):
            whole = sum(1 for _ in artifacts_below(store, self.selection.prefix))
            count = math.ceil(whole * float(wanted[:-1]) / 100)
        else:
            count = int(wanted)
        found = list(islice(listed, count))
        for number, each in enumerate(listed, len(found)):
            if (at := random.randrange(number + 1)) < count:  # noqa: S311 - chance, not a secret
                found[at] = each
        return found

    def _oldest(self, store: Store, listed: Iterator[Artifact]) -> Iterator[Artifact]:
        def timed() -> Iterator[tuple[float, str]]:
            while batch := [each.prefix for each in islice(listed, _BATCH)]:
                yield from zip(self.attempt.verdicts.times(store.name, batch), batch, strict=True)

        return (Artifact.of_prefix(place) for _, place in heapq.nsmallest(self.selection.oldest, timed()))

    def _reached(self, store: str) -> str:
        """How far an earlier attempt has come, whose findings are this job's too."""
        if self.attempt.number == 1:
            return ""
        job_id = self.attempt.job_id
        known = (each for each in self.attempt.verdicts.findings() if (each.job_id, each.store) == (job_id, store))
        self.damaged.update({f"{store}:{each.place}": list(each.findings) for each in known})
        return self.attempt.verdicts.reached(job_id, store)

    def _forget_gone(self, store: Store, started: float) -> None:
        """Drop what is remembered and counted of artifacts that somebody else has removed."""
        for place in list(self.attempt.verdicts.noted(store.name, started)):
            artifact = Artifact.of_prefix(place)
            if next(iter(store.list(artifact.prefix)), None) is None:
                self.attempt.verdicts.forget(store.name, place)
        for account, place in self.attempt.quota.places(store.name):
            if not self.attempt.verdicts.times(store.name, [place])[0] and next(iter(store.list(place)), None) is None:
                self.attempt.quota.forget(account, store.name, place)

    def _error(self) -> CorruptImage:
        told = [finding for findings in self.damaged.values() for finding in findings]
        more = f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        count = len(self.damaged)
        what = f"{count} artifact{'s are' if count > 1 else ' is'} damaged, of {self.artifacts} that were read: "
        remedy = "`ssvm verify --findings` lists all. Restore what is damaged from another store"
        if any("newer ssvm-worker" in finding for finding in told):
            remedy += ", and upgrade this worker for what it cannot read"
        return CorruptImage(what + "; ".join(told[:_TOLD]) + more, ", ".join(self.damaged)[:1000], remedy)
