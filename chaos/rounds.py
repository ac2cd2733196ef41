"""One run: rounds of jobs and faults, with all checks after each round."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ssvm_worker.artifacts.layout import MANIFEST
from ssvm_worker.ledger.record import Record

from . import invariants
from .faults import FAULTS, FaultContext, unavailable
from .workload import SubmittedJob, Workload
from .zone import ChaosZone, until

#: Faults of one round, one after the other, while its jobs run.
_FAULTS_PER_ROUND = 3
#: The faults after which S3 may receive a request of an ended attempt, or refuses the abort of its upload.
_DELAYING = {
    *("network to S3 silent", "a worker frozen beyond its claim", "a pool process frozen beyond its claim"),
    "the workers' clock is set",
}
#: Seconds until what expires by time is gone.
_EXPIRY_S = 30.0
#: The worker's log line for a fenced attempt.
_FENCED = "belongs to another worker now; this attempt has ended"
#: The log lines for internal errors.
_BUGS = ("failed: internal error", "a round failed")


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass
class Tally:
    """The counters of a run."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    #: Jobs that ran when the fault started, by fault.
    struck: Counter[str] = field(default_factory=Counter)
    absent: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    states: Counter[str] = field(default_factory=Counter)
    #: How attempts ended, by the error's class.
    attempts: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    #: Objects that S3 stored after the end of their job. The clean-up has deleted them.
    late: int = 0
    #: Attempts that noticed that they had lost their claim.
    fenced: int = 0
    whole: int = 0
    commits: int = 0
    #: Bytes that the publisher sent, and bytes of stored downloads.
    fetched: int = 0
    needed: int = 0
    #: Bytes sent to S3, and bytes of all object versions.
    sent: int = 0
    kept: int = 0
    seconds: float = 0.0


class Run:
    """A seeded run in a zone."""

    def __init__(
        self, zone: ChaosZone, seed: int, say: Callable[[str], None] = lambda _: None, without: Sequence[str] = ()
    ) -> None:
        """Prepare a run. Call *say* after each round. *without*: names of skipped faults."""
        self._zone, self._say, self._rng = zone, say, Random(seed)
        self.workload = Workload(zone, self._rng)
        self._context = FaultContext(zone, self.workload, self._rng)
        self.tally = Tally(seed, absent=dict.fromkeys(without, "left out") | unavailable(zone))
        self._fault_names = self._shuffled()

    def run(self, count: int) -> Tally:
        """Inject *count* faults; raise Broken with all violations at the end of the first bad round."""
        started = time.monotonic()
        names = list(itertools.islice(self._fault_names, count))
        for start in range(0, count, _FAULTS_PER_ROUND):
            self._round(names[start : start + _FAULTS_PER_ROUND])
            self._count_all()
            self.tally.seconds = time.monotonic() - started
        return self.tally

    def _shuffled(self) -> Iterator[str]:
        """Yield all faults in random order, again and again."""
        names = [name for name in FAULTS if name not in self.tally.absent]
        while True:
            yield from self._rng.sample(names, len(names))

    def _round(self, names: list[str]) -> None:
        self.tally.rounds += 1
        self.workload.begin()
        with Commits(self._zone, self.workload) as commits:
            try:
                for name in names:
                    self._inject(name)
                flaws = self._check_round(names, commits)
            except AssertionError as error:
                flaws = [str(error)]
        if flaws:
            raise Broken(self._report(names, flaws))
        self.tally.faults.update(names)
        self._say(f"round {self.tally.rounds}: {', '.join(names)}: {len(self.workload.jobs)} jobs, all checks passed")

    def _inject(self, name: str) -> None:
        zone, rng = self._zone, self._rng
        self.workload.ask(rng.randint(2, 4))
        until(lambda: self._is_busy(), "a job runs, or all have ended")
        time.sleep(rng.uniform(0.0, 0.8))
        self.tally.struck[name] += zone.running()
        with FAULTS[name](self._context):
            time.sleep(rng.uniform(0.1, 1.0))
            zone.start_missing_workers()  # as a supervisor does
        if rng.random() < 0.4:
            self.workload.cancel()

    def _is_busy(self) -> bool:
        self._zone.start_missing_workers()
        return self._zone.running() > 0 or self._all_ended()

    # The end of a round

    def _check_round(self, names: list[str], commits: Commits) -> list[str]:
        zone, workload = self._zone, self.workload
        zone.start_missing_workers()
        zone.wait_ready()
        until(self._all_ended, "all jobs have ended")
        flaws = [each for job in workload.jobs for each in invariants.unexplained(self._record(job), names)]
        # Retry each failed job, as an administrator does, and some cancelled jobs.
        retried = []
        for job in workload.jobs:
            state = self._record(job).state
            if state == "failed" or (state == "cancelled" and self._rng.random() < 0.5):
                workload.retry(job)
                retried.append(job)
        self.tally.retried += len(retried)
        until(self._all_ended, "all retried jobs have ended")
        for record in map(self._record, retried):
            if record.state != "succeeded":
                flaws.append(f"{record.job_id} failed again: {record.error}")
        for job in workload.jobs:
            for copy_id in workload.record_outcome(job, self._record(job)):
                until(lambda copy_id=copy_id: zone.site.ledger.get(copy_id).ended, f"copy job {copy_id} has ended")
                workload.record_copy(job)
        if not flaws:
            self._settle(names)
        return flaws + self._check_invariants(commits)

    def _settle(self, names: list[str]) -> None:
        """Wait until nothing is left. After some faults, run the clean-up if S3 has late objects or open uploads.

        The proxy held the request, or its process was frozen between the check of its claim and the request. No client
        can prevent this. The object has no manifest, or is the draft beside one. A wrong clock prevents an abort.
        """
        zone, left = self._zone, list[str]()

        def is_clean() -> bool:
            left[:] = [*invariants.find_leftovers(zone), *invariants.find_strays(zone, self.workload)]
            return not left

        with suppress(AssertionError):
            until(is_clean, "nothing is left", _EXPIRY_S)
        if left and not _DELAYING.isdisjoint(names):
            self.tally.late += len(left)
            zone.site.wait(zone.site.submit("cleanup", older_than="0"))
            is_clean()
        assert not left, f"left after {_EXPIRY_S:g} s: {left}"

    def _check_invariants(self, commits: Commits) -> list[str]:
        zone, workload = self._zone, self.workload
        records = [self._record(job) for job in workload.jobs]
        for record in records:
            self.tally.states[record.state] += 1
            self.tally.attempts.update((each.error or {}).get("error", "succeeded") for each in record.attempts)
        self.tally.commits += sum(commits.written.values())
        return [
            *invariants.check_ledger(zone, records),
            *invariants.check_stores(zone, workload),
            *invariants.check_commits(zone, commits.written),
            *(f"{log}: {line}" for log, line in self._log_lines() if any(each in line for each in _BUGS)),
        ]

    def _log_lines(self) -> Iterator[tuple[Path, str]]:
        """Yield the log lines of all workers."""
        for worker in self._zone.site.workers:
            for line in worker.log.read_text(errors="replace").splitlines():
                yield worker.log, line

    def _all_ended(self) -> bool:
        counts = self._zone.site.ledger.counts()
        return not counts["queued"] and not counts["running"]

    def _record(self, job: SubmittedJob) -> Record:
        return self._zone.site.ledger.get(job.job_id)

    # Counters

    def _count_all(self) -> None:
        zone, tally = self._zone, self.tally
        tally.whole = self.workload.made
        tally.fenced = sum(_FENCED in line for _, line in self._log_lines())
        tally.fetched, tally.needed = zone.publisher.sent.total(), self.workload.needed
        tally.sent = zone.proxies["S3"].up
        tally.kept = 0
        for bucket in (zone.bucket, zone.out):
            pages = zone.s3.client().get_paginator("list_object_versions").paginate(Bucket=bucket)
            tally.kept += sum(each["Size"] for page in pages for each in page.get("Versions", []))

    def _report(self, names: list[str], flaws: list[str]) -> str:
        jobs = [f"  {job.job_id} {job.kind} {job.artifact.prefix}: {_story(self._record(job))}"
                for job in self.workload.jobs]  # fmt: skip
        head = f"seed {self.tally.seed}, round {self.tally.rounds} ({', '.join(names)}); logs in {self._zone.scratch}"
        return "\n".join([head, *(f"- {each}" for each in flaws), "jobs:", *jobs])


def _story(record: Record) -> str:
    errors = [(each.error or {}).get("message", "ok") for each in record.attempts]
    return f"{record.state}, {len(errors)} attempts: {'; '.join(errors)}"


class Commits:
    """Counts the writes of each manifest to the directory store. Use it as a context manager."""

    def __init__(self, zone: ChaosZone, workload: Workload) -> None:
        self._root, self._workload = zone.site.store, workload
        self._seen: dict[str, set[tuple[int, int]]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="commits", daemon=True)

    @property
    def written(self) -> dict[str, int]:
        """Return the number of writes, by the artifact's prefix."""
        return {prefix: len(each) for prefix, each in self._seen.items()}

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            for job in list(self._workload.jobs):
                if job.kind in ("download", "backup"):
                    self._look(job.artifact.prefix)

    def _look(self, prefix: str) -> None:
        try:
            stat = (self._root / prefix / MANIFEST).stat()
        except OSError:
            return
        self._seen.setdefault(prefix, set()).add((stat.st_ino, stat.st_mtime_ns))

    def __enter__(self) -> Commits:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
