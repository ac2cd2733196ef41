"""How long a job stands still when its worker is killed: kill -9 of whole workers, by the default settings."""

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
from ssvm_worker.wiring.celery_sender import ring

from .contest import Row
from .emptyjobs import WAITING
from .queue import Yard, wait, yard

_MOST_S = 15.0
#: Workers that are killed at once, at moments of their own; as many stand by.
_AT_ONCE = 3
#: Seconds within which they are: longer than a claim and a round together, so that every phase of both is met.
_WITHIN_S = 5.0


def bench(_: Path, size: int, runs: int) -> list[Row]:
    """*size* is the number of kills here."""
    stood: list[float] = []
    with yard("[worker]\nconcurrency = 1\n") as it, ExitStack() as stack:
        workers: dict[str, subprocess.Popen[bytes]] = {}
        while len(stood) < size:
            for name in [name for name, each in workers.items() if each.poll() is not None]:
                del workers[name]
            while len(workers) < 2 * _AT_ONCE:
                name = f"worker{len(stood)}-{len(workers)}-{time.monotonic_ns()}"
                workers[name] = stack.enter_context(it.worker(name))
            stood += _round(it, list(workers.values()))
            print(f"  {len(stood)} kills: {stood[-1]:.1f} s", file=sys.stderr, flush=True)
    stood = sorted(stood[:size])
    at = [f"{name} {each:.1f}" for name, each in zip(("min", "median", "p90", "max"), _figures(stood), strict=True)]
    good = "yes" if stood[-1] <= _MOST_S else "**no**"
    return [Row(f"recovery, {size} times kill -9", f"{', '.join(at)} s", "", "", f"≤ {_MOST_S:.0f} s", good)]


def _figures(stood: list[float]) -> tuple[float, float, float, float]:
    return stood[0], statistics.median(stood), stood[int(0.9 * (len(stood) - 1))], stood[-1]


def _round(it: Yard, workers: list[subprocess.Popen[bytes]]) -> list[float]:
    """Some jobs begin, their workers are killed; seconds until each has its next attempt. Then they are cancelled."""
    ids = [it.ledger.submit(new_job(it.settings, WAITING, {}))[0] for _ in range(_AT_ONCE)]
    for record in ids:
        ring(it.settings, record)
    wait(lambda: all(it.ledger.get(each.job_id).state == "running" for each in ids), "the jobs run")
    time.sleep(1.5)  # each has renewed its claim
    by_name = {_name_of(each): each for each in workers}
    killed: dict[str, float] = {}
    until = time.time() + _WITHIN_S
    for moment, record in _moments(_running(it, ids)):
        time.sleep(max(0.0, moment - (_WITHIN_S - (until - time.time()))))
        os.killpg(by_name[record.attempts[-1].worker].pid, signal.SIGKILL)
        killed[record.job_id] = time.time()
    wait(lambda: all(len(it.ledger.get(each).attempts) == 2 for each in killed), "all are taken over")
    found = [it.ledger.get(each).attempts[1].started - at for each, at in killed.items()]
    for each in killed:
        it.ledger.cancel(each, "the bench")
    wait(lambda: all(it.ledger.get(each).ended for each in killed), "all have ended")
    return found


def _moments(records: list[Record]) -> list[tuple[float, Record]]:
    """When each one's worker is killed, the first first."""
    drawn = [(random.uniform(0, _WITHIN_S), each) for each in records]
    return sorted(drawn, key=lambda pair: pair[0])


def _running(it: Yard, ids: list[Record]) -> list[Record]:
    return [it.ledger.get(each.job_id) for each in ids]


def _name_of(worker: subprocess.Popen[bytes]) -> str:
    """The name that it has in the ledger: the one on its command line, and the host."""
    words = Path(f"/proc/{worker.pid}/cmdline").read_text().split("\0")
    return words[words.index("-n") + 1].replace("%h", os.uname().nodename)
