"""Verify many artifacts of a store: all, a random sample, or those that were not verified for the longest time."""

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
from ssvm_worker.artifacts.manifest import artifacts_below, find_manifest
from ssvm_worker.errors import NOT_THERE, CorruptImage, Permanent
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.usage import record_usage
from ssvm_worker.streaming.interfaces import Store

from .artifact import ArtifactCheck

#: The number of artifacts in one query for the times of their verification.
_BATCH = 1000
#: The most findings in the error. `ssvm verify --findings` lists them all.
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Selection:
    """The artifacts to verify. Exactly one of the first three fields is set."""

    all: bool = False
    #: A number, or a percentage.
    sample: str = ""
    oldest: int = 0
    #: Only artifacts below this prefix.
    prefix: str = ""


@dataclass
class Scrub:
    """One attempt to verify the selected artifacts."""

    attempt: Attempt
    artifact_check: ArtifactCheck
    selection: Selection
    #: The findings of damaged artifacts, by ``store:prefix``.
    damaged: dict[str, list[str]] = field(default_factory=dict)
    artifacts: int = 0

    def run(self, stores: list[str]) -> dict[str, Any]:
        """Read the selected artifacts of each store. At the end raise CorruptImage if any is damaged."""
        size = 0
        for name in stores:
            store = self.attempt.store(name)
            self.attempt.progress.start(f"verify {name}")
            last_verified = self._last_verified(name)
            started = time.time()
            for artifact in self._select(store):
                self.attempt.check()
                if self.selection.all and f"{artifact.prefix}/" <= f"{last_verified}/":
                    continue
                findings = self._verify(store, artifact)
                if findings is None:
                    continue
                self.artifacts += 1
                self.artifact_check.record(store, artifact, findings)
                if findings:
                    self.attempt.log.warning("%s:%s is damaged: %s", store.name, artifact.prefix, "; ".join(findings))
                    self.damaged[f"{store.name}:{artifact.prefix}"] = findings
            if self.selection.all and not self.selection.prefix and self.artifact_check.recorded:
                with suppress(*NOT_THERE):  # the next scrub repeats this
                    self._forget_deleted(store, started)
            size += self.attempt.progress.bytes
        if self.damaged:
            raise self._error()
        counts = {"artifacts": self.artifacts, "bytes": size, "findings": 0}
        return counts | {"stores": stores, "recorded": self.artifact_check.recorded}

    def _verify(self, store: Store, artifact: Artifact) -> list[str] | None:
        """Return the findings. Return None if the artifact was deleted or replaced while it was read."""
        try:
            manifest = find_manifest(store, artifact)
        except Permanent as error:
            return [f"{error.where}: {error.what}"]
        if manifest is None:
            return None
        try:
            findings = self.artifact_check.findings(store, manifest)
        except Permanent as error:
            findings = [f"{error.where}: {error.what}"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # The manifest's facts about its disks are invalid. The scrub continues with the other artifacts.
            self.attempt.log.exception("%s:%s cannot be verified", store.name, artifact.prefix)
            findings = [f"{store.name}:{artifact.prefix}: its manifest contradicts itself: {type(error).__name__}"]
        with suppress(Permanent):
            if findings and find_manifest(store, artifact) != manifest:
                return None
        record_usage(self.attempt, store, manifest)
        return findings

    def _select(self, store: Store) -> Iterator[Artifact]:
        """Return the selected artifacts, all and samples sorted by prefix. Only selected artifacts need memory."""
        listed = artifacts_below(store, self.selection.prefix)
        if self.selection.all:
            return listed
        if self.selection.oldest:
            return self._oldest(store, listed)
        return iter(sorted(self._sample(store, listed), key=lambda each: each.prefix))

    def _sample(self, store: Store, listed: Iterator[Artifact]) -> list[Artifact]:
        """Select artifacts with equal probability, with algorithm R. A percentage needs a listing to count first."""
        wanted = self.selection.sample
        if wanted.endswith("%"):
            total = sum(1 for _ in artifacts_below(store, self.selection.prefix))
            count = math.ceil(total * float(wanted[:-1]) / 100)
        else:
            count = int(wanted)
        selected = list(islice(listed, count))
        for number, each in enumerate(listed, len(selected)):
            if (index := random.randrange(number + 1)) < count:  # noqa: S311 - needs no secure random numbers
                selected[index] = each
        return selected

    def _oldest(self, store: Store, listed: Iterator[Artifact]) -> Iterator[Artifact]:
        """Select the artifacts that were not verified for the longest time."""

        def with_times() -> Iterator[tuple[float, str]]:
            while batch := [each.prefix for each in islice(listed, _BATCH)]:
                yield from zip(self.attempt.services.scrub_results.times(store.name, batch), batch, strict=True)

        return (Artifact.of_prefix(prefix) for _, prefix in heapq.nsmallest(self.selection.oldest, with_times()))

    def _last_verified(self, store: str) -> str:
        """Return the last artifact that an earlier attempt has verified. Take over the findings of that attempt."""
        if self.attempt.number == 1:
            return ""
        job_id = self.attempt.job_id
        known = (
            each
            for each in self.attempt.services.scrub_results.findings()
            if (each.job_id, each.store) == (job_id, store)
        )
        self.damaged.update({f"{store}:{each.place}": list(each.findings) for each in known})
        return self.attempt.services.scrub_results.reached(job_id, store)

    def _forget_deleted(self, store: Store, started: float) -> None:
        """Delete the results and the usage of artifacts that no longer exist."""
        for prefix in list(self.attempt.services.scrub_results.noted(store.name, started)):
            artifact = Artifact.of_prefix(prefix)
            if next(iter(store.list(artifact.prefix)), None) is None:
                self.attempt.services.scrub_results.forget(store.name, prefix)
        for account, prefix in self.attempt.services.quota.places(store.name):
            verified = self.attempt.services.scrub_results.times(store.name, [prefix])[0]
            if not verified and next(iter(store.list(prefix)), None) is None:
                self.attempt.services.quota.forget(account, store.name, prefix)

    def _error(self) -> CorruptImage:
        findings = [finding for found in self.damaged.values() for finding in found]
        more = f"; and {len(findings) - _MAX_SHOWN} more" if len(findings) > _MAX_SHOWN else ""
        count = len(self.damaged)
        what = f"{count} artifact{'s are' if count > 1 else ' is'} damaged, of {self.artifacts} that were read: "
        remedy = "`ssvm verify --findings` lists all. Restore the damaged artifacts from another store"
        if any("newer ssvm-worker" in finding for finding in findings):
            remedy += ". Upgrade this worker for artifacts that it cannot read"
        return CorruptImage(what + "; ".join(findings[:_MAX_SHOWN]) + more, ", ".join(self.damaged)[:1000], remedy)
