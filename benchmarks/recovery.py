"""Time until another worker continues the job of a killed worker: kill -9 of workers, with default settings."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring.assembly import new_job
from ssvm_worker.wiring.celery_sender import send_wakeup

from .contest import Row
from .emptyjobs import APP, WAITING
from .workers import QueueSetup, queue_setup, wait

_MAX_S = 15.0
#: Workers that are killed in one round. The same number of workers is idle.
_AT_ONCE = 3
#: The kills happen at random times in this period. It is longer than a claim and a reaper round, to meet every phase.
_PERIOD_S = 5.0


def bench(_: Path, size: int, runs: int) -> list[Row]:
    """Kill *size* workers."""
    delays: list[float] = []
    with queue_setup("[worker]\nconcurrency = 1\n") as setup, ExitStack() as stack:
        workers: dict[str, subprocess.Popen[bytes]] = {}
        while len(delays) < size:
            for name in [name for name, each in workers.items() if each.poll() is not None]:
                del workers[name]
            while len(workers) < 2 * _AT_ONCE:
                name = f"worker{len(delays)}-{len(workers)}-{time.monotonic_ns()}"
                workers[name] = stack.enter_context(setup.worker(name, APP))
            delays += _round(setup, list(workers.values()))
            print(f"  {len(delays)} kills: {delays[-1]:.1f} s", file=sys.stderr, flush=True)
    delays = sorted(delays[:size])
    figures = delays[0], statistics.median(delays), delays[int(0.9 * (size - 1))], delays[-1]
    at = [f"{name} {each:.1f}" for name, each in zip(("min", "median", "p90", "max"), figures, strict=True)]
    good = "yes" if delays[-1] <= _MAX_S else "**no**"
    return [Row(f"recovery, {size} times kill -9", f"{', '.join(at)} s", "", "", f"≤ {_MAX_S:.0f} s", good)]


def _round(setup: QueueSetup, workers: list[subprocess.Popen[bytes]]) -> list[float]:
    """Start jobs, kill their workers, and return the seconds until each job has its next attempt. Cancel the jobs."""
    ids = [setup.ledger.submit(new_job(setup.settings, WAITING, {}))[0] for _ in range(_AT_ONCE)]
    for record in ids:
        send_wakeup(setup.settings, record)
    wait(lambda: all(setup.ledger.get(each.job_id).state == "running" for each in ids), "the jobs run")
    time.sleep(1.5)  # each worker renews its claim
    by_name = {_name_of(each): each for each in workers}
    killed: dict[str, float] = {}
    until = time.time() + _PERIOD_S
    for moment, record in _moments([setup.ledger.get(each.job_id) for each in ids]):
        time.sleep(max(0.0, moment - (_PERIOD_S - (until - time.time()))))
        os.killpg(by_name[record.attempts[-1].worker].pid, signal.SIGKILL)
        killed[record.job_id] = time.time()
    wait(lambda: all(len(setup.ledger.get(each).attempts) == 2 for each in killed), "other workers run the jobs")
    found = [setup.ledger.get(each).attempts[1].started - at for each, at in killed.items()]
    for each in killed:
        setup.ledger.cancel(each, "the benchmark")
    wait(lambda: all(setup.ledger.get(each).ended for each in killed), "all have ended")
    return found


def _moments(records: list[Record]) -> list[tuple[float, Record]]:
    """Choose the time of each kill, in ascending order."""
    drawn = [(random.uniform(0, _PERIOD_S), each) for each in records]
    return sorted(drawn, key=lambda pair: pair[0])


def _name_of(worker: subprocess.Popen[bytes]) -> str:
    """Return the worker's name in the ledger: the name on its command line, and the host."""
    words = Path(f"/proc/{worker.pid}/cmdline").read_text().split("\0")
    return words[words.index("-n") + 1].replace("%h", os.uname().nodename)
