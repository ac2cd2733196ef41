"""Brokers and workers for the benchmarks, and the cost of a job inside a running worker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssvm_worker.config import load
from ssvm_worker.config.schema import Settings
from ssvm_worker.jobs import JOBS
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Record
from ssvm_worker.runner.worker_command import worker_command
from ssvm_worker.wiring.assembly import new_job, open_ledger
from ssvm_worker.wiring.celery_sender import send_wakeup
from tests.servers.broker import StoppableBroker

from .contest import OURS, WARM, Broken, Contender, Cost

_TIMEOUT_S = 600.0
_POLL_S = 0.005


@dataclass
class QueueSetup:
    """A broker with settings and a ledger."""

    broker: StoppableBroker
    directory: Path
    settings: Settings
    ledger: Ledger

    @contextmanager
    def worker(self, name: str = "worker", app: Sequence[str] = ("tasks",)) -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker while the block runs. *app*: the words after ``python -m`` that start it."""
        argv, environ = worker_command(self.settings)
        argv[1 : argv.index("worker")] = ["-m", *app]
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
    state = "" if "state_dir" in more else f'state_dir = "{directory}/state"\n'
    file.write_text(f'zone = "z"\n{state}{more}[broker]\nurl = "{broker.url}"\n')
    settings = load(file, {})
    try:
        with open_ledger(settings) as ledger:
            yield QueueSetup(broker, directory, settings, ledger)
    finally:
        broker.stop()
        shutil.rmtree(directory, ignore_errors=True)


def wait(condition: Callable[[], bool], what: str, poll_s: float = _POLL_S) -> None:
    """Wait until a condition is true; raise Broken after ten minutes."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"timed out waiting until {what}")
        time.sleep(poll_s)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_of(pids: Sequence[int]) -> float:
    """Return the CPU seconds of these processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int, field: str, file: str = "status") -> int:
    """Return the bytes of a line of /proc/PID/status, or of another file there (proc(5))."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


@dataclass(frozen=True)
class WarmWorker:
    """A running worker. Its jobs cost what their records and its processes say."""

    setup: QueueSetup
    pid: int

    @property
    def pids(self) -> list[int]:
        """Return the main process, then the processes of the pool."""
        return [self.pid, *children_of(self.pid)]

    def run(self, job: str, fields: Mapping[str, Any]) -> Cost:
        """Run one job. The wall time is that from the start to the end of its attempt, by its record."""
        return self.run_all(job, [fields])

    def run_all(self, job: str, requests: Sequence[Mapping[str, Any]]) -> Cost:
        """Run jobs at once. The wall time is that from the first start to the last end.

        The memory is the highest peak of a process. Raise Broken if a job fails.
        """
        pids, settings, ledger = self.pids, self.setup.settings, self.setup.ledger
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): reset the peak to the current value
        before = cpu_of(pids)
        ids = []
        for fields in requests:
            record = ledger.submit(new_job(settings, JOBS[job], dict(fields)))[0]
            send_wakeup(settings, record)
            ids.append(record.job_id)
        wait(lambda: all(ledger.get(each).ended for each in ids), "the jobs have ended", 0.02)
        records = [ledger.get(each) for each in ids]
        for each in records:
            _check(each)
        started = min(each.attempts[-1].started for each in records)
        ended = max(each.attempts[-1].ended for each in records)
        cpu = cpu_of(pids) - before
        return Cost(ended - started, cpu, max(memory_of(pid, "VmHWM") for pid in pids))


def _check(record: Record) -> None:
    if record.state != "succeeded" or len(record.attempts) != 1:
        raise Broken(f"the job {record.job} is {record.state} after {len(record.attempts)} attempts: {record.error}")


@contextmanager
def warm_worker(config: Path, processes: int = 1) -> Iterator[WarmWorker]:
    """Run a worker with the settings of *config* while the block runs."""
    text = f"{config.read_text()}[worker]\nconcurrency = {processes}\n"
    with queue_setup(text) as setup, setup.worker() as process:
        yield WarmWorker(setup, process.pid)


def own_sides(
    config: Path, worker: WarmWorker, job: str, fields: Mapping[str, str], made: Callable[[], int]
) -> list[Contender]:
    """Return our two sides: the job in the foreground, and the same job inside the running worker."""
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", job, "--json", *options]
    request = {name: value.split(",") if name == "stores" else value for name, value in fields.items()}
    return [
        Contender(OURS, command, made, {"SSVM_CONFIG": str(config)}),
        Contender(WARM, (), made, measure=lambda: worker.run(job, request)),
    ]
