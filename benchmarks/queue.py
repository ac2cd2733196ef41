"""Cost of the ledger: an empty job from submit to its end, compared with a bare Celery task on the same worker."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from celery import Celery
from kombu import Queue

from ssvm_worker.config import load
from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import queue_name
from ssvm_worker.runner.worker_command import worker_command
from ssvm_worker.wiring.assembly import new_job, open_ledger
from ssvm_worker.wiring.celery_sender import ring
from tests.servers.broker import StoppableBroker

from .contest import Broken, Row
from .emptyjobs import EMPTY

#: Our rate must be at least this share of Celery's own.
_TARGET = 0.6
_TIMEOUT_S = 300.0
_POLL_S = 0.005


@dataclass
class QueueSetup:
    """A broker with settings and a ledger."""

    broker: StoppableBroker
    directory: Path
    settings: Settings
    ledger: Ledger

    @contextmanager
    def worker(self, name: str = "worker") -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker of the benchmarks' app while the block runs."""
        argv, environ = worker_command(self.settings)
        argv[1 : argv.index("worker")] = ["-m", "celery", "-A", "benchmarks.emptyjobs"]
        log = self.directory / f"{name}.log"
        environ = os.environ | environ | {"SSVM_CONFIG": str(self.directory / "worker.toml")}
        with log.open("wb") as file:
            process = subprocess.Popen(argv, env=environ, stdout=file, stderr=file, start_new_session=True)
        try:
            wait(lambda: b" ready." in log.read_bytes() or process.poll() is not None, "the worker is ready")
            if process.poll() is not None:
                raise Broken(f"the worker has ended: {log.read_text()[-2000:]}")
            yield process
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def queue_setup(more: str = "") -> Iterator[QueueSetup]:
    """Run a broker that persists its data, as in production. *more*: additional lines of the settings file."""
    directory = Path(tempfile.mkdtemp(prefix="ssvm-bench-"))  # a socket has a short path
    broker = StoppableBroker(directory)
    broker.start()
    file = directory / "worker.toml"
    file.write_text(f'zone = "z"\n[broker]\nurl = "{broker.url}"\n{more}')
    settings = load(file, {})
    try:
        with open_ledger(settings) as ledger:
            yield QueueSetup(broker, directory, settings, ledger)
    finally:
        broker.stop()
        shutil.rmtree(directory, ignore_errors=True)


def wait(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition is true; raise Broken after 300 seconds."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"timed out waiting until {what}")
        time.sleep(_POLL_S)


def bench(_: Path, size: int, runs: int) -> list[Row]:
    """Run *size* jobs and *size* tasks in each round."""
    costs: dict[str, list[_Cost]] = {"ours": [], "celery": []}
    with queue_setup() as setup, setup.worker() as worker:
        sides = {"celery": _Bare(setup), "ours": _Jobs(setup)}
        for side in sides.values():  # warm up: imports and connections
            side.round(size // 10 + 2)
        for number in range(runs):
            for name in sorted(sides, reverse=bool(number % 2)):
                before = _cpu_of(worker.pid, setup.broker.pid)
                wall = sides[name].round(size)
                costs[name].append(_Cost(wall / size, (_cpu_of(worker.pid, setup.broker.pid) - before) / size))
                print(f"  {name}: {costs[name][-1]}", file=sys.stderr, flush=True)
    ours, celery = (_median(costs[name]) for name in ("ours", "celery"))
    ratios = sorted(theirs.wall / mine.wall for mine, theirs in zip(costs["ours"], costs["celery"], strict=True))
    return [
        Row(
            f"queue, {size:,} empty jobs",
            str(ours),
            f"bare Celery task: {celery}",
            f"{celery.wall / ours.wall:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})",
            f"≥ {_TARGET}",
            "yes" if celery.wall / ours.wall >= _TARGET else "**no**",
        )
    ]


@dataclass(frozen=True)
class _Cost:
    """Seconds of one job or task. The CPU time is the sum of sender, worker and broker."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{1 / self.wall:.0f}/s ({self.cpu * 1000:.2f} ms CPU each)"


def _median(costs: list[_Cost]) -> _Cost:
    return _Cost(statistics.median(each.wall for each in costs), statistics.median(each.cpu for each in costs))


def _cpu_of(worker: int, broker: int) -> float:
    """Return the CPU seconds so far of this process, the worker with its pool, and the broker."""
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    ticks = 0
    for pid in (worker, broker, *children):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


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
            ring(settings, ledger.submit(new_job(settings, EMPTY, {}))[0])
        wait(lambda: ledger.counts()["succeeded"] == goal, "all jobs have ended")
        return time.perf_counter() - started
