"""Cost of the ledger: an empty job from submit to its end, compared with a bare Celery task on the same worker."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from celery import Celery
from kombu import Queue

from ssvm_worker.ledger.record import queue_name
from ssvm_worker.wiring.assembly import new_job
from ssvm_worker.wiring.celery_sender import send_wakeup

from .contest import Row
from .emptyjobs import APP, EMPTY
from .workers import QueueSetup, children_of, cpu_of, queue_setup, wait

#: Our rate must be at least this share of Celery's own.
_TARGET = 0.6


#: The numbers of workers on one broker.
_WORKERS = (1, 2, 4)


def bench(_: Path, size: int, runs: int) -> list[Row]:
    """Run *size* jobs and *size* tasks in each round on one worker, then *size* jobs on several workers."""
    with queue_setup() as setup:
        with setup.worker(app=APP) as worker:
            rows = [_compared(setup, worker.pid, size, runs)]
        return rows + [_several(setup, count, size) for count in _WORKERS]


def _compared(setup: QueueSetup, worker: int, size: int, runs: int) -> Row:
    costs: dict[str, list[_Cost]] = {"ours": [], "celery": []}
    sides = {"celery": _Bare(setup), "ours": _Jobs(setup)}
    for side in sides.values():  # warm up: imports and connections
        side.round(size // 10 + 2)
    for number in range(runs):
        for name in sorted(sides, reverse=bool(number % 2)):
            before = _cpu_of([worker], setup.broker.pid)
            wall = sides[name].round(size)
            costs[name].append(_Cost(wall / size, (_cpu_of([worker], setup.broker.pid) - before) / size))
            print(f"  {name}: {costs[name][-1]}", file=sys.stderr, flush=True)
    ours, celery = (_median(costs[name]) for name in ("ours", "celery"))
    ratios = sorted(theirs.wall / mine.wall for mine, theirs in zip(costs["ours"], costs["celery"], strict=True))
    return Row(
        f"queue, {size:,} empty jobs",
        str(ours),
        f"bare Celery task: {celery}",
        f"{celery.wall / ours.wall:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})",
        f"≥ {_TARGET}",
        "yes" if celery.wall / ours.wall >= _TARGET else "**no**",
    )


def _several(setup: QueueSetup, count: int, size: int) -> Row:
    with ExitStack() as stack:
        workers = [stack.enter_context(setup.worker(f"worker{each}", APP)).pid for each in range(count)]
        side = _Jobs(setup)
        side.round(size // 10 + 2)
        before = _cpu_of(workers, setup.broker.pid)
        wall = side.round(size)
        cost = _Cost(wall / size, (_cpu_of(workers, setup.broker.pid) - before) / size)
    print(f"  {count} workers: {cost}", file=sys.stderr, flush=True)
    return Row(f"queue, {size:,} empty jobs, workers: {count}", str(cost), "", "", "", "")


@dataclass(frozen=True)
class _Cost:
    """Seconds of one job or task. The CPU time is the sum of sender, worker and broker."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{1 / self.wall:.0f}/s ({self.cpu * 1000:.2f} ms CPU each)"


def _median(costs: list[_Cost]) -> _Cost:
    return _Cost(statistics.median(each.wall for each in costs), statistics.median(each.cpu for each in costs))


def _cpu_of(workers: Sequence[int], broker: int) -> float:
    """Return the CPU seconds so far of this process, the workers with their pools, and the broker."""
    return time.process_time() + cpu_of([broker, *workers, *(each for pid in workers for each in children_of(pid))])


class _Bare:
    """Celery's side: bare tasks without results."""

    def __init__(self, setup: QueueSetup) -> None:
        self._app = Celery("bare", broker=setup.broker.url, set_as_current=False)
        self._app.conf.task_ignore_result = True
        name = queue_name("z", "maintenance")
        self._queue = Queue(name, routing_key=name)
        self._broker = setup.broker.with_prefix("")

    def round(self, size: int) -> float:
        """Return the seconds from the first message until no message waits.

        The last tasks may still run, which favours Celery.
        """
        with self._broker.client() as client:
            started = time.perf_counter()
            for _ in range(size):
                self._app.send_task("bench.bare", queue=self._queue)
            wait(lambda: not client.exists(self._queue.name, "unacked"), "all tasks are taken")
            return time.perf_counter() - started


class _Jobs:
    """Our side: the functions of ``ssvm submit``."""

    def __init__(self, setup: QueueSetup) -> None:
        self._setup = setup

    def round(self, size: int) -> float:
        """Return the seconds from the first submit until the ledger has the end of the last job."""
        settings, ledger = self._setup.settings, self._setup.ledger
        goal = ledger.counts()["succeeded"] + size
        started = time.perf_counter()
        for _ in range(size):
            send_wakeup(settings, ledger.submit(new_job(settings, EMPTY, {}))[0])
        wait(lambda: ledger.counts()["succeeded"] == goal, "all jobs have ended")
        return time.perf_counter() - started
