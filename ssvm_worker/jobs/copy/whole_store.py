"""Copy all artifacts of a store, several at once: each is an ordinary copy job, of which this one makes the sum."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
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
from ssvm_worker.jobs.attempt import Attempt, Progress, SubJob
from ssvm_worker.jobs.parallel import in_parallel
from ssvm_worker.jobs.request import fingerprint, parse_request
from ssvm_worker.streaming.interfaces import StoredObject

#: Artifacts that are told one by one, of those that failed and of the others; all have a job's record each.
_TOLD = 1000
#: After one of these no further artifact is begun: the next would meet it too.
_HOPELESS = (StoreFull, StoreAway, ConfigError)
#: After so many of these in a row it is the store, and not the artifact.
_ROUGH, _IN_A_ROW = (StoreUnavailable, SourceUnavailable), 20

#: An artifact and about how many bytes it has.
_Weighed = tuple[Artifact, int]


@dataclass
class Migration:
    """One attempt at it; what is found whole at the targets, by its manifest, is done. Holds 400 bytes an artifact."""

    attempt: Attempt
    #: What each copy's request has beside the artifact: source, stores, move, patient.
    fields: Mapping[str, Any]
    prefix: str
    parallel: int
    #: Of artifacts, by what became of them.
    counts: Counter[str] = field(default_factory=Counter)
    #: Bytes copied.
    size: int = 0
    #: Objects of the source that belong to no complete artifact; they stay where they are.
    others: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)
    passed: list[dict[str, Any]] = field(default_factory=list)
    #: What earlier attempts at this job have done, by place.
    _before: dict[str, dict[str, Any]] = field(default_factory=dict)
    _worst: WorkerError | None = None
    _in_a_row: int = 0
    _stopped: bool = False
    _found: int = 0
    _waiting: Iterator[list[_Weighed]] = field(default_factory=lambda: iter(()))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> dict[str, Any]:
        """Copy what is not there yet; what goes wrong with one artifact does not stop the others.

        Raises, at the end, an error of the gravest kind that any of them met, with the result in it.
        """
        source = self.attempt.store(self.fields["source"])
        for name in self.fields["stores"]:  # opened here, once, and not by several threads
            self.attempt.store(name)
        self.attempt.progress.start(f"list {source.name}")
        if self.attempt.number > 1:
            self._remember()
        groups = list(self._listed(source.list(self.prefix)))
        self._found = sum(map(len, groups))
        size = sum(size for group in groups for _, size in group)
        self.attempt.progress.start(self._stage, size * self._passes)
        self._waiting = iter(groups)
        in_parallel(self.parallel, [self._work] * self.parallel)
        self.attempt.check()
        return self._ended()

    def _remember(self) -> None:
        for record in self.attempt.jobs.parts(self.attempt.job_id):
            if record["state"] == "succeeded":
                row = _outcome(record["result"], record["job_id"])
                self._before[record["result"]["prefix"]] = row

    def _listed(self, objects: Iterator[StoredObject]) -> Iterator[list[_Weighed]]:
        """The complete artifacts; together those that only one job at a time may write."""
        group: list[_Weighed] = []
        for place, of in groupby(objects, lambda each: place_of(each.key)):
            self.attempt.check()
            here = list(of)
            if place.endswith(f"/{PACKS}"):
                continue  # they come with the backups that need them
            if not place or not any(each.key == f"{place}/{MANIFEST}" for each in here):
                self.others += len(here)
                continue
            artifact = Artifact.of_prefix(place)
            if group and group[0][0].resource != artifact.resource:
                yield group
                group = []
            group.append((artifact, sum(each.size for each in here)))
        if group:
            yield group

    @property
    def _passes(self) -> int:
        """How often the bytes of an artifact pass: to each store, and when moved, back from it to be verified."""
        return len(self.fields["stores"]) * (2 if self.fields["move"] else 1)

    @property
    def _stage(self) -> str:
        return f"copy {sum(self.counts.values())} of {self._found}"

    def _work(self) -> None:
        """What each thread does."""
        try:
            while group := self._next():
                self._group(group)
        except BaseException:
            self._stopped = True
            raise

    def _group(self, group: list[_Weighed]) -> None:
        for artifact, size in group:
            if not self._stopped:
                self.attempt.check()
                self._one(artifact, size * self._passes)

    def _next(self) -> list[_Weighed] | None:
        with self._lock:
            return None if self._stopped else next(self._waiting, None)

    def _one(self, artifact: Artifact, expected: int) -> None:
        row: dict[str, Any] = {"artifact": artifact.prefix}
        share = _Share(self.attempt.progress)
        error: WorkerError | None = None
        try:
            row |= self._copied(artifact, share)
        except Cancelled as stopped:
            if self.attempt.stop_reason():
                raise
            row |= {"outcome": "cancelled"}  # somebody has cancelled this one alone
            if stopped.reason == "fenced":
                error = ResourceBusy("Another worker has taken it over", artifact.prefix, "Let that end")
        except WorkerError as caught:
            error = caught
        if error:
            row |= {"outcome": "failed", "error": error.as_dict()}
            self.attempt.log.info("%s is not copied: %s", artifact.prefix, error)
        with self._lock:
            self._note(row, error, share.seen - expected)

    def _note(self, row: dict[str, Any], error: WorkerError | None, more: int) -> None:
        """Take the row down; *more* bytes, or fewer, have passed than were expected."""
        told = self.failed if error else self.passed
        if len(told) < _TOLD:
            told.append(row)
        self.counts[row["outcome"]] += 1
        self.size += row.get("bytes", 0)
        self._in_a_row = self._in_a_row + 1 if isinstance(error, _ROUGH) else 0
        if error and (isinstance(error, _HOPELESS) or self._in_a_row >= _IN_A_ROW):
            self._stopped, self._worst = True, error
        elif error and not self._stopped and (not self._worst or error.retryable > self._worst.retryable):
            self._worst = error
        progress = self.attempt.progress
        progress.stage, progress.total = self._stage, (progress.total or 0) + more
        progress.publish()

    def _copied(self, artifact: Artifact, share: Progress) -> dict[str, Any]:
        """What became of it: copied, moved, there (before us), or gone (meanwhile)."""
        before = self._before.pop(artifact.prefix, None)
        if outcome := self._known(artifact):
            return before or {"outcome": outcome}
        names = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "volume": artifact.volume}
        request = {**names, **self.fields}
        job_id = f"{self.attempt.job_id[:90]}.{fingerprint(artifact.prefix)[:16]}"
        with self.attempt.jobs.begin(self.attempt.job_id, job_id, "copy", request) as sub:
            if sub is None:
                raise ResourceBusy("Another job is at work on it", artifact.prefix, "Let that end, and run this again")
            sub.result = self._run(sub, request, share)
            return _outcome(sub.result, sub.job_id)

    def _known(self, artifact: Artifact) -> str:
        """Without any job: whether it is there, or gone; "" if there is something to do."""
        source = find_manifest(self.attempt.store(self.fields["source"]), artifact)
        if source is None or self.fields["move"]:
            return "" if source else "gone"
        there = (find_manifest(self.attempt.store(name), artifact) for name in self.fields["stores"])
        return "there" if all(each and each.entries == source.entries for each in there) else ""

    def _run(self, sub: SubJob, request: dict[str, Any], share: Progress) -> dict[str, Any]:
        def confirm() -> None:
            self.attempt.confirm()
            sub.confirm()

        def stop_reason() -> str | None:
            return self.attempt.stop_reason() or sub.stop_reason()

        job = find_job("copy")
        it = replace(self.attempt, job_id=sub.job_id, token=sub.token, progress=share)
        it = replace(it, confirm=confirm, stop_reason=stop_reason)
        parsed = parse_request(job.Request, request, job.name)
        try:
            return job.run(parsed, it)
        except BaseException as error:
            if not self.attempt.will_resume(error) and sub.stop_reason() != "fenced":
                self._discard(parsed, it.for_cleanup())
            raise

    def _discard(self, request: Any, attempt: Attempt) -> None:
        """Remove what is left; that this fails too must not hide why the copy did."""
        try:
            find_job("copy").discard(request, attempt)
        except WorkerError as error:
            self.attempt.log.warning("leftovers remain until `ssvm cleanup`: %s", error)

    def _ended(self) -> dict[str, Any]:
        for place, row in self._before.items():  # not there any more: it was moved
            if row["outcome"] == "moved":
                self._found += 1
                self._note({"artifact": place} | row, None, 0)
        left = self._found - sum(self.counts.values())
        result = {
            "source": self.fields["source"],
            "stores": list(self.fields["stores"]),
            "found": self._found,
            "counts": dict(self.counts),
            "bytes": self.size,
            "not_begun": left,
            "others": self.others,
            "artifacts": [*self.failed, *self.passed][:_TOLD],
        }
        worst = self._worst
        if worst is None:
            return result
        what = f"{self.counts['failed'] + left} of {self._found} artifacts are not copied; {worst.what}"
        remedy = "Once the cause is mended, ask again: what is copied is not copied twice"
        error = type(worst)(what, worst.where, remedy)
        error.result = result
        raise error


def _outcome(result: Mapping[str, Any], job_id: str) -> dict[str, Any]:
    """The row of a copy that has succeeded."""
    copied = result["copied"].values()
    outcome = "there" if copied and all(each["reused"] for each in copied) else "copied"
    size = sum(each["bytes"] for each in copied)
    return {"outcome": "moved" if result["moved"] else outcome, "bytes": size, "job_id": job_id}


class _Share(Progress):
    """The progress of one copy, as a part of the whole."""

    def __init__(self, whole: Progress) -> None:
        super().__init__()
        self.seen = 0
        self._whole = whole

    def advance(self, size: int) -> None:
        """More bytes have passed."""
        super().advance(size)
        self.seen += size
        self._whole.advance(size)
