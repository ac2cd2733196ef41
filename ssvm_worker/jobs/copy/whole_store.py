"""Copy all artifacts of a store, several at the same time. Each is an ordinary copy job; this job adds the results."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Any

from ssvm_worker.artifacts.layout import MANIFEST, PACKS, Artifact, place_of
from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.errors import (
    Cancelled,
    ConfigError,
    ResourceBusy,
    SourceUnavailable,
    StoreAway,
    StoreFull,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.jobs import find_job
from ssvm_worker.jobs.attempt import Attempt, Progress
from ssvm_worker.jobs.parallel import in_parallel
from ssvm_worker.jobs.request import fingerprint, parse_request
from ssvm_worker.jobs.services import SubJob
from ssvm_worker.streaming.interfaces import StoredObject

#: The most artifacts in the result, of failed ones and of the others. Each artifact also has the record of its job.
_MAX_LISTED = 1000
#: After one of these errors no further copy starts, because it would fail in the same way.
_FATAL = (StoreFull, StoreAway, ConfigError)
#: After so many of these errors in a row, the cause is the store and not the artifact.
_STORE_ERRORS, _MAX_IN_A_ROW = (StoreUnavailable, SourceUnavailable), 20

#: An artifact and its approximate size in bytes.
_Sized = tuple[Artifact, int]


@dataclass
class Migration:
    """One attempt to copy all artifacts. It skips artifacts that the targets have, by their manifests.

    It needs 400 bytes of memory per artifact.
    """

    attempt: Attempt
    #: The fields of each copy's request, without the artifact: source, stores, move, patient.
    fields: Mapping[str, Any]
    prefix: str
    parallel: int
    #: The number of artifacts by outcome.
    counts: Counter[str] = field(default_factory=Counter)
    #: Copied bytes.
    size: int = 0
    #: The number of objects at the source that belong to no complete artifact. They are not copied.
    others: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)
    passed: list[dict[str, Any]] = field(default_factory=list)
    #: The outcomes of earlier attempts at this job, by prefix.
    _before: dict[str, dict[str, Any]] = field(default_factory=dict)
    _worst: WorkerError | None = None
    _in_a_row: int = 0
    _stopped: bool = False
    _found: int = 0
    _waiting: Iterator[list[_Sized]] = field(default_factory=lambda: iter(()))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> dict[str, Any]:
        """Copy the artifacts that the targets lack. An error with one artifact does not stop the others.

        At the end this raises an error of the gravest kind that any copy had. Its ``result`` is this job's result.
        """
        source = self.attempt.store(self.fields["source"])
        for name in self.fields["stores"]:  # opened here once, not by several threads
            self.attempt.store(name)
        self.attempt.progress.start(f"list {source.name}")
        if self.attempt.number > 1:
            for record in self.attempt.services.jobs.parts(self.attempt.job_id):
                if record["state"] == "succeeded":
                    self._before[record["result"]["prefix"]] = _outcome(record["result"], record["job_id"])
        groups = list(self._group_artifacts(source.list(self.prefix)))
        self._found = sum(map(len, groups))
        size = sum(size for group in groups for _, size in group)
        self.attempt.progress.start(self._stage, size * self._passes)
        self._waiting = iter(groups)
        in_parallel(self.parallel, [self._work] * self.parallel)
        self.attempt.check()
        return self._result()

    def _group_artifacts(self, objects: Iterator[StoredObject]) -> Iterator[list[_Sized]]:
        """Yield the complete artifacts. Each group has one resource, so its copies run one after the other."""
        group: list[_Sized] = []
        for prefix, grouped in groupby(objects, lambda each: place_of(each.key)):
            self.attempt.check()
            members = list(grouped)
            if prefix.endswith(f"/{PACKS}"):
                continue  # packs are copied with the backups that need them
            if not prefix or not any(each.key == f"{prefix}/{MANIFEST}" for each in members):
                self.others += len(members)
                continue
            artifact = Artifact.of_prefix(prefix)
            if group and group[0][0].resource != artifact.resource:
                yield group
                group = []
            group.append((artifact, sum(each.size for each in members)))
        if group:
            yield group

    @property
    def _passes(self) -> int:
        """Return how often the bytes of an artifact pass: to each store, and in a move back to be verified."""
        return len(self.fields["stores"]) * (2 if self.fields["move"] else 1)

    @property
    def _stage(self) -> str:
        return f"copy {sum(self.counts.values())} of {self._found}"

    def _work(self) -> None:
        """Copy groups until none is left. Each thread runs this method."""
        try:
            while group := self._next_group():
                for artifact, size in takewhile(lambda _: not self._stopped, group):
                    self.attempt.check()
                    self._handle(artifact, size * self._passes)
        except BaseException:
            self._stopped = True
            raise

    def _next_group(self) -> list[_Sized] | None:
        with self._lock:
            return None if self._stopped else next(self._waiting, None)

    def _handle(self, artifact: Artifact, expected: int) -> None:
        """Copy an artifact of *expected* bytes, all passes together, and record the outcome."""
        row: dict[str, Any] = {"artifact": artifact.prefix}
        share = _Share(self.attempt.progress)
        error: WorkerError | None = None
        try:
            row |= self._copy(artifact, share)
        except Cancelled as stopped:
            if self.attempt.stop_reason():
                raise
            row |= {"outcome": "cancelled"}  # a user has cancelled the job of this artifact alone
            if stopped.reason == "fenced":
                error = ResourceBusy("Another worker now runs this copy", artifact.prefix, "Wait until it has ended")
        except WorkerError as caught:
            error = caught
        if error:
            row |= {"outcome": "failed", "error": error.as_dict()}
            self.attempt.log.info("%s is not copied: %s", artifact.prefix, error)
        with self._lock:
            self._record(row, error, share.seen - expected)

    def _record(self, row: dict[str, Any], error: WorkerError | None, more: int) -> None:
        """Add the outcome of an artifact. *more* is the difference of the moved bytes to the expected bytes."""
        rows = self.failed if error else self.passed
        if len(rows) < _MAX_LISTED:
            rows.append(row)
        self.counts[row["outcome"]] += 1
        self.size += row.get("bytes", 0)
        self._in_a_row = self._in_a_row + 1 if isinstance(error, _STORE_ERRORS) else 0
        if error and (isinstance(error, _FATAL) or self._in_a_row >= _MAX_IN_A_ROW):
            self._stopped, self._worst = True, error
        elif error and not self._stopped and (not self._worst or error.retryable > self._worst.retryable):
            self._worst = error
        progress = self.attempt.progress
        progress.stage, progress.total = self._stage, (progress.total or 0) + more
        progress.publish()

    def _copy(self, artifact: Artifact, share: Progress) -> dict[str, Any]:
        """Copy an artifact. Return its outcome: copied, moved, there (existed before), or gone (deleted meanwhile)."""
        before = self._before.pop(artifact.prefix, None)
        if outcome := self._outcome_without_copy(artifact):
            return before or {"outcome": outcome}
        names = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "volume": artifact.volume}
        request = {**names, **self.fields}
        job_id = f"{self.attempt.job_id[:90]}.{fingerprint(artifact.prefix)[:16]}"
        with self.attempt.services.jobs.begin(self.attempt.job_id, job_id, "copy", request) as sub:
            if sub is None:
                what, remedy = "Another job writes this artifact", "Wait until it has ended, and run this again"
                raise ResourceBusy(what, artifact.prefix, remedy)
            sub.result = self._run(sub, request, share)
            return _outcome(sub.result, sub.job_id)

    def _outcome_without_copy(self, artifact: Artifact) -> str:
        """Return "there" or "gone" if the manifests show that no job is needed, else ""."""
        source = find_manifest(self.attempt.store(self.fields["source"]), artifact)
        if source is None or self.fields["move"]:
            return "" if source else "gone"
        targets = (find_manifest(self.attempt.store(name), artifact) for name in self.fields["stores"])
        return "there" if all(each and each.entries == source.entries for each in targets) else ""

    def _run(self, sub: SubJob, request: dict[str, Any], share: Progress) -> dict[str, Any]:
        """Run the copy job of one artifact in this attempt, with the claim of that job."""

        def confirm() -> None:
            self.attempt.confirm()
            sub.confirm()

        def stop_reason() -> str | None:
            return self.attempt.stop_reason() or sub.stop_reason()

        job = find_job("copy")
        attempt = replace(self.attempt, job_id=sub.job_id, token=sub.token, progress=share)
        attempt = replace(attempt, confirm=confirm, stop_reason=stop_reason)
        parsed = parse_request(job.Request, request, job.name)
        try:
            return job.run(parsed, attempt)
        except BaseException as error:
            if not self.attempt.will_resume(error) and sub.stop_reason() != "fenced":
                try:
                    job.discard(parsed, attempt.for_cleanup())
                except WorkerError as failed:  # must not hide the error of the copy
                    self.attempt.log.warning("leftovers remain until `ssvm cleanup`: %s", failed)
            raise

    def _result(self) -> dict[str, Any]:
        """Return the result, or raise an error of the gravest kind with the result."""
        for prefix, row in self._before.items():  # a moved artifact is no longer listed at the source
            if row["outcome"] == "moved":
                self._found += 1
                self._record({"artifact": prefix} | row, None, 0)
        not_begun = self._found - sum(self.counts.values())
        result = {
            "source": self.fields["source"],
            "stores": list(self.fields["stores"]),
            "found": self._found,
            "counts": dict(self.counts),
            "bytes": self.size,
            "not_begun": not_begun,
            "others": self.others,
            "artifacts": [*self.failed, *self.passed][:_MAX_LISTED],
        }
        worst = self._worst
        if worst is None:
            return result
        what = f"{self.counts['failed'] + not_begun} of {self._found} artifacts are not copied; {worst.what}"
        remedy = "Fix the cause and run the job again. It skips the artifacts that are copied"
        error = type(worst)(what, worst.where, remedy)
        error.result = result
        raise error


def _outcome(result: Mapping[str, Any], job_id: str) -> dict[str, Any]:
    """Return the row of a successful copy."""
    copied = result["copied"].values()
    outcome = "there" if copied and all(each["reused"] for each in copied) else "copied"
    size = sum(each["bytes"] for each in copied)
    return {"outcome": "moved" if result["moved"] else outcome, "bytes": size, "job_id": job_id}


class _Share(Progress):
    """The progress of one copy. It also advances the progress of the whole job."""

    def __init__(self, parent: Progress) -> None:
        super().__init__()
        self.seen = 0
        self._parent = parent

    def advance(self, size: int) -> None:
        """Add *size* bytes."""
        super().advance(size)
        self.seen += size
        self._parent.advance(size)
