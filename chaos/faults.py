"""The faults. Each is a context manager that injects a fault and repairs, at its end, what the zone cannot repair.

A new fault is one function and one line in FAULTS.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.servers.worker import ROOT, WorkerProcess

from .workload import SubmittedJob, Workload
from .zone import ATTEMPTS, CLAIM_S, ChaosZone, MiB, until

#: Hours by which a clock jumps.
_HOURS = (-30, -3, 3, 30)
_LANES = ("download", "upload", "backup", "maintenance")


@dataclass(frozen=True)
class FaultContext:
    """The objects that a fault may change."""

    zone: ChaosZone
    workload: Workload
    rng: Random

    def worker(self) -> WorkerProcess:
        """Choose a worker that receives messages."""
        self.zone.start_missing_workers()
        self.zone.wait_ready()
        return self.rng.choice(self.zone.workers)


Fault = Callable[[FaultContext], AbstractContextManager[None]]


# Workers


@contextmanager
def child_killed(context: FaultContext) -> Iterator[None]:
    """Kill a pool process, as the out-of-memory killer does."""
    _signal(context.rng.sample(_children(context.worker()) or [0], 1), signal.SIGKILL)
    yield


@contextmanager
def main_killed(context: FaultContext) -> Iterator[None]:
    """Kill a worker's main process. Its pool must not continue alone."""
    worker = context.worker()
    with suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)
    worker.process.wait()
    yield


@contextmanager
def worker_killed(context: FaultContext) -> Iterator[None]:
    """Kill all processes of a worker, as if its machine lost power."""
    context.worker().kill()
    yield


@contextmanager
def all_killed(context: FaultContext) -> Iterator[None]:
    """Kill all workers. For a moment no worker can notice."""
    for worker in context.zone.workers:
        worker.kill()
    yield


@contextmanager
def frozen(context: FaultContext) -> Iterator[None]:
    """Freeze a worker until its claims expire. Other workers then run its jobs."""
    worker = context.worker()
    worker.signal_all(signal.SIGSTOP)
    try:
        time.sleep(CLAIM_S + context.rng.uniform(0.5, 2.5))
        yield
    finally:
        worker.signal_all(signal.SIGCONT)


@contextmanager
def child_frozen(context: FaultContext) -> Iterator[None]:
    """Freeze one pool process until its claim expires. Its main process continues."""
    chosen = context.rng.sample(_children(context.worker()) or [0], 1)
    _signal(chosen, signal.SIGSTOP)
    try:
        time.sleep(CLAIM_S + context.rng.uniform(0.5, 2.5))
        yield
    finally:
        _signal(chosen, signal.SIGCONT)


def _signal(processes: list[int], number: int) -> None:
    for each in filter(None, processes):
        with suppress(ProcessLookupError):
            os.kill(each, number)


@contextmanager
def drained(context: FaultContext) -> Iterator[None]:
    """Send SIGTERM. The worker hands its jobs over within drain_s and exits with status 0."""
    worker = context.worker()
    worker.process.terminate()
    yield
    _wait_end(worker.process, "the drained worker", 0)


def _wait_end(process: subprocess.Popen[bytes], what: str, *allowed: int) -> None:
    try:
        status = process.wait(120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{what} did not end in two minutes") from None
    assert status in allowed, f"{what} ended with status {status}"


# The broker


@contextmanager
def broker_restarted(context: FaultContext) -> Iterator[None]:
    """Stop and start the broker, which keeps its append-only file."""
    context.zone.broker.stop()
    try:
        yield
    finally:
        context.zone.broker.start()


@contextmanager
def broker_killed(context: FaultContext) -> Iterator[None]:
    """Kill the broker with SIGKILL and start it again."""
    context.zone.broker.kill()
    try:
        yield
    finally:
        context.zone.broker.start()


@contextmanager
def broker_frozen(context: FaultContext) -> Iterator[None]:
    """Freeze the broker, sometimes until claims expire, because no worker can renew them."""
    pid = context.zone.broker.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(context.rng.choice([0.5, CLAIM_S + 1.0]))
    finally:
        os.kill(pid, signal.SIGCONT)
    yield


@contextmanager
def broker_paused(context: FaultContext) -> Iterator[None]:
    """Pause the broker with CLIENT PAUSE."""
    with context.zone.site.broker.client() as client:
        client.client_pause(round(context.rng.uniform(0.5, CLAIM_S + 1.0) * 1000))
    yield


@contextmanager
def connections_dropped(context: FaultContext) -> Iterator[None]:
    """Let the broker drop all connections of all clients."""
    with context.zone.site.broker.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    yield


@contextmanager
def messages_lost(context: FaultContext) -> Iterator[None]:
    """Delete Celery's lists repeatedly. The ledger stays."""
    lanes = [f"{context.zone.site.broker.prefix}ssvm.z.{lane}" for lane in _LANES]
    context.workload.ask(2)
    with context.zone.site.broker.client() as client:
        for _ in range(10):
            client.delete(*lanes)
            time.sleep(0.02)
    yield


@contextmanager
def messages_doubled(context: FaultContext) -> Iterator[None]:
    """Send each message of the round ten more times, with the job id alone and with the complete request."""
    jobs = list(context.workload.jobs)
    for job in jobs:
        for number in range(10):
            request = job.request | {"job_id": job.job_id} if number % 2 else {"job_id": job.job_id}
            context.zone.site.send(job.kind, request)
    yield


@contextmanager
def many_reapers(context: FaultContext) -> Iterator[None]:
    """Run ``ssvm reap`` three times at once, in addition to the workers' reapers."""
    command = [sys.executable, "-m", "ssvm_worker", "reap"]
    environ = {**os.environ, "SSVM_CONFIG": str(context.zone.site.file)}
    reapers = [subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL) for _ in range(3)]
    yield
    for each in reapers:
        _wait_end(each, "ssvm reap", 0, 75)


# The network


def _network_fault(inject: Callable[[FaultContext, str], None], *names: str) -> Fault:
    @contextmanager
    def fault(context: FaultContext) -> Iterator[None]:
        name = context.rng.choice(names)
        inject(context, name)
        try:
            yield
        finally:
            context.zone.proxies[name].heal()

    return fault


def _hold(context: FaultContext, name: str) -> None:
    context.zone.proxies[name].hold()
    time.sleep(context.rng.uniform(0.5, 2.5))


def _slow(context: FaultContext, name: str) -> None:
    context.zone.proxies[name].rate = 200_000
    time.sleep(1.0)


_SOURCES = ("the vCenter", "the publisher")


@contextmanager
def stream_cut(context: FaultContext) -> Iterator[None]:
    """Cut off the next disk that a host sends, or end its lease."""
    what = context.rng.choice(["cut", "end", "expire"])
    context.zone.set_vcenter_faults(get={"do": what, "at": context.rng.randrange(200_000), "times": 1})
    yield
    context.zone.set_vcenter_faults()


# Disks and clocks


@contextmanager
def disk_full(context: FaultContext) -> Iterator[None]:
    """Fill the primary store completely or nearly."""
    assert context.zone.disk
    context.zone.disk.fill(context.rng.choice([0, 4096, 300_000]))
    try:
        time.sleep(context.rng.uniform(0.3, 1.5))
        yield
    finally:
        context.zone.disk.empty()


@contextmanager
def workers_clock(context: FaultContext) -> Iterator[None]:
    """Set the wall clock of all workers, and correct it later."""
    context.zone.worker_clock.jump(3600 * context.rng.choice(_HOURS))
    try:
        time.sleep(1.0)
        yield
    finally:
        context.zone.worker_clock.jump(0)


@contextmanager
def brokers_clock(context: FaultContext) -> Iterator[None]:
    """Set the wall clock of the broker, which the ledger uses, and correct it later."""
    context.zone.broker_clock.jump(3600 * context.rng.choice(_HOURS))
    try:
        time.sleep(context.rng.uniform(0.5, CLAIM_S + 1.0))
        yield
    finally:
        context.zone.broker_clock.jump(0)


# Jobs


@contextmanager
def poison(context: FaultContext) -> Iterator[None]:
    """Kill each pool process that runs a certain job, until the job fails. Check the history of its attempts."""
    job = context.workload.download(6 * MiB)
    job.request["stores"] = ["primary"]
    context.workload.submit(job)
    over = threading.Event()
    killer = threading.Thread(target=_kill_runners, args=(context.zone, job, over), daemon=True)
    killer.start()
    ledger = context.zone.site.ledger
    try:
        until(lambda: ledger.get(job.job_id).ended, f"the poison job {job.job_id} fails")
    finally:
        over.set()
        killer.join()
    record = ledger.get(job.job_id)
    errors = [(each.error or {}).get("error") for each in record.attempts]
    assert record.state == "failed", record.state
    assert errors.count("WorkerLost") >= ATTEMPTS, errors
    assert all(each.worker and each.host and each.started and each.ended for each in record.attempts)
    yield


def _kill_runners(zone: ChaosZone, job: SubmittedJob, over: threading.Event) -> None:
    while not over.wait(0.05):
        record = zone.site.ledger.get(job.job_id)
        if record.state == "running" and not record.ending:
            children = [child for worker in zone.workers for child in _children(worker)]
            _signal([each for each in children if _has_open(each, job.artifact.prefix)], signal.SIGKILL)


def _children(worker: WorkerProcess) -> list[int]:
    """Return the pool processes of a worker; none if the worker has just died."""
    with suppress(OSError):
        return worker.children()
    return []


def _has_open(process: int, prefix: str) -> bool:
    """Return whether a process has a file below this prefix of the directory store open."""
    with suppress(OSError):
        return any(prefix in os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir())
    return False


#: All faults, by their names in the table.
FAULTS: dict[str, Fault] = {
    "kill -9 of a pool process": child_killed,
    "kill -9 of a main process": main_killed,
    "kill -9 of a worker": worker_killed,
    "kill -9 of all workers": all_killed,
    "a worker frozen beyond its claim": frozen,
    "a pool process frozen beyond its claim": child_frozen,
    "SIGTERM": drained,
    "broker restarted": broker_restarted,
    "broker killed": broker_killed,
    "broker frozen": broker_frozen,
    "broker paused": broker_paused,
    "broker drops all connections": connections_dropped,
    "all messages lost": messages_lost,
    "the same message many times": messages_doubled,
    "many reapers": many_reapers,
    "network to S3 cut": _network_fault(lambda context, name: context.zone.proxies[name].cut(), "S3"),
    "network to S3 reset": _network_fault(lambda context, name: context.zone.proxies[name].reset(), "S3"),
    "network to S3 slow": _network_fault(_slow, "S3"),
    "network to S3 silent": _network_fault(_hold, "S3"),
    "network to a source cut": _network_fault(lambda context, name: context.zone.proxies[name].cut(), *_SOURCES),
    "network to a source reset": _network_fault(lambda context, name: context.zone.proxies[name].reset(), *_SOURCES),
    "network to a source silent": _network_fault(_hold, *_SOURCES),
    "a host's stream or lease ends early": stream_cut,
    "disk full": disk_full,
    "the workers' clock is set": workers_clock,
    "the broker's clock is set": brokers_clock,
    "a poison job": poison,
}


def unavailable(zone: ChaosZone) -> dict[str, str]:
    """Return the faults that this machine cannot inject, with the reason."""
    found = {}
    if zone.disk is None:
        found["disk full"] = "needs root, to mount a small file system"
    if not zone.worker_clock.environ:
        found |= dict.fromkeys(["the workers' clock is set", "the broker's clock is set"], "needs a C compiler")
    return found
