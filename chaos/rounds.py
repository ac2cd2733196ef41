"""One run: rounds of jobs and faults, and after each round a look at everything."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ssvm_worker.artifacts.layout import MANIFEST
from ssvm_worker.ledger.record import Record

from . import invariants
from .faults import FAULTS, Scene, unavailable
from .mix import Deed, Mix
from .town import Town, until

#: Faults of one round, one after the other, while its jobs run.
_TOGETHER = 3
#: What a worker says of an attempt whose job is another's.
_FENCED = "belongs to another worker now; this attempt has ended"
#: And of our own mistakes.
_BUGS = ("failed: internal error", "a round failed")


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass
class Tally:
    """What came of a run."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    #: Jobs that ran when it struck, by fault.
    struck: Counter[str] = field(default_factory=Counter)
    absent: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    states: Counter[str] = field(default_factory=Counter)
    #: How attempts ended, by the error's class.
    attempts: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    #: Attempts that found their job to be another's.
    fenced: int = 0
    whole: int = 0
    commits: int = 0
    #: Bytes that the publisher sent, and those of downloads that stand.
    fetched: int = 0
    needed: int = 0
    #: Bytes to S3 by the wire, and those of all objects that it has or had.
    sent: int = 0
    kept: int = 0
    seconds: float = 0.0


class Run:
    """A seeded run over a town."""

    def __init__(
        self, town: Town, seed: int, say: Callable[[str], None] = lambda _: None, without: Sequence[str] = ()
    ) -> None:
        """*say* hears of each round; *without* names faults that are left out."""
        self._town, self._say, self._rng = town, say, Random(seed)
        self.mix = Mix(town, self._rng)
        self._scene = Scene(town, self.mix, self._rng)
        self.tally = Tally(seed, absent=dict.fromkeys(without, "left out") | unavailable(town))
        self._deck = self._shuffled()

    def run(self, count: int) -> Tally:
        """So many faults; Broken, with all that is wrong, at the end of the first round that does not end well."""
        started = time.monotonic()
        names = list(itertools.islice(self._deck, count))
        for at in range(0, count, _TOGETHER):
            self._round(names[at : at + _TOGETHER])
            self._count_all()
            self.tally.seconds = time.monotonic() - started
        return self.tally

    def _shuffled(self) -> Iterator[str]:
        """Each fault once, in any order, and all of them again."""
        names = [name for name in FAULTS if name not in self.tally.absent]
        while True:
            yield from self._rng.sample(names, len(names))

    def _round(self, names: list[str]) -> None:
        self.tally.rounds += 1
        self.mix.begin()
        with Commits(self._town, self.mix) as commits:
            try:
                for name in names:
                    self._strike(name)
                flaws = self._settle(names, commits)
            except AssertionError as error:
                flaws = [str(error)]
        if flaws:
            raise Broken(self._report(names, flaws))
        self.tally.faults.update(names)
        self._say(f"round {self.tally.rounds}: {', '.join(names)}: {len(self.mix.deeds)} jobs, all is well")

    def _strike(self, name: str) -> None:
        town, rng = self._town, self._rng
        self.mix.ask(rng.randint(2, 4))
        until(lambda: self._is_busy(), "a job runs, or all have ended")
        time.sleep(rng.uniform(0.0, 0.8))
        self.tally.struck[name] += town.running()
        with FAULTS[name](self._scene):
            time.sleep(rng.uniform(0.1, 1.0))
            # What a supervisor does at once.
            town.muster()
        if rng.random() < 0.4:
            self.mix.cancel()

    def _is_busy(self) -> bool:
        self._town.muster()
        return self._town.running() > 0 or self._all_ended()

    # The end of a round

    def _settle(self, names: list[str], commits: Commits) -> list[str]:
        town, mix = self._town, self.mix
        town.muster()
        town.ready()
        until(self._all_ended, "all jobs have ended")
        flaws = [each for deed in mix.deeds for each in invariants.unexplained(self._record(deed), names)]
        again = [deed for deed in mix.deeds if self._is_retried(self._record(deed))]
        for deed in again:
            mix.retry(deed)
        self.tally.retried += len(again)
        until(self._all_ended, "all jobs have ended that were retried")
        flaws += [f"{deed.job_id} failed again: {self._record(deed).error}" for deed in again if self._failed(deed)]
        for deed in mix.deeds:
            for copy_id in mix.settle(deed, self._record(deed)):
                until(lambda copy_id=copy_id: town.site.ledger.get(copy_id).ended, f"{copy_id} brings what is owed")
                mix.arrived(deed)
        until(lambda: not list(invariants.leftovers(town)), "nothing is left", 30.0) if not flaws else None
        return flaws + self._look(commits)

    def _look(self, commits: Commits) -> list[str]:
        town, mix = self._town, self.mix
        records = [self._record(deed) for deed in mix.deeds]
        self._count(records)
        self.tally.commits += sum(commits.written.values())
        return [
            *invariants.of_ledger(town, records),
            *invariants.of_stores(town, mix),
            *invariants.of_commits(town, commits.written),
            *self._of_logs(),
        ]

    def _of_logs(self) -> Iterator[str]:
        for log, line in self._logged():
            if any(each in line for each in _BUGS):
                yield f"{log}: {line}"

    def _logged(self) -> Iterator[tuple[Path, str]]:
        """What the workers have said."""
        for worker in self._town.site.workers:
            for line in worker.log.read_text(errors="replace").splitlines():
                yield worker.log, line

    def _all_ended(self) -> bool:
        counts = self._town.site.ledger.counts()
        return not counts["queued"] and not counts["running"]

    def _is_retried(self, record: Record) -> bool:
        """What failed, an administrator retries, as the fault has gone; and somebody changes his mind."""
        return record.state == "failed" or (record.state == "cancelled" and self._rng.random() < 0.5)

    def _failed(self, deed: Deed) -> bool:
        return self._record(deed).state != "succeeded"

    def _record(self, deed: Deed) -> Record:
        return self._town.site.ledger.get(deed.job_id)

    # Figures

    def _count(self, records: list[Record]) -> None:
        for record in records:
            self.tally.states[record.state] += 1
            self.tally.attempts.update((each.error or {}).get("error", "succeeded") for each in record.attempts)

    def _count_all(self) -> None:
        town, tally = self._town, self.tally
        tally.whole = self.mix.made
        tally.fenced = sum(_FENCED in line for _, line in self._logged())
        tally.fetched, tally.needed = town.publisher.sent.total(), self.mix.needed
        tally.sent = town.wires["S3"].up
        tally.kept = 0
        for bucket in (town.bucket, town.out):
            pages = town.s3.client().get_paginator("list_object_versions").paginate(Bucket=bucket)
            tally.kept += sum(each["Size"] for page in pages for each in page.get("Versions", []))

    def _report(self, names: list[str], flaws: list[str]) -> str:
        jobs = [f"  {deed.job_id} {deed.job} {deed.artifact.prefix}: {_story(self._record(deed))}"
                for deed in self.mix.deeds]  # fmt: skip
        head = f"seed {self.tally.seed}, round {self.tally.rounds} ({', '.join(names)}); logs in {self._town.scratch}"
        return "\n".join([head, *(f"- {each}" for each in flaws), "jobs:", *jobs])


def _story(record: Record) -> str:
    errors = [(each.error or {}).get("message", "ok") for each in record.attempts]
    return f"{record.state}, {len(errors)} attempts: {'; '.join(errors)}"


class Commits:
    """Sees how often each manifest of this round is written to the directory; a context manager."""

    def __init__(self, town: Town, mix: Mix) -> None:
        self._root, self._mix = town.site.store, mix
        self._seen: dict[str, set[tuple[int, int]]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="commits", daemon=True)

    @property
    def written(self) -> dict[str, int]:
        """How often, by the artifact's place."""
        return {place: len(each) for place, each in self._seen.items()}

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            for deed in list(self._mix.deeds):
                if deed.job in ("download", "backup"):
                    self._look(deed.artifact.prefix)

    def _look(self, place: str) -> None:
        try:
            seen = (self._root / place / MANIFEST).stat()
        except OSError:
            return
        self._seen.setdefault(place, set()).add((seen.st_ino, seen.st_mtime_ns))

    def __enter__(self) -> Commits:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
