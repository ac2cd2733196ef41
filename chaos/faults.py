"""What goes wrong: each fault hurts the town within a context, and has healed what does not heal by itself at its end.

A new one is one function and its line in FAULTS.
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

import redis

from tests.servers.worker import ROOT, WorkerProcess

from .mix import Deed, Mix
from .town import ATTEMPTS, CLAIM_S, MiB, Town, until

#: Hours by which a clock jumps.
_HOURS = (-30, -3, 3, 30)
_LANES = ("download", "upload", "backup", "maintenance")


@dataclass(frozen=True)
class Scene:
    """What a fault may touch."""

    town: Town
    mix: Mix
    rng: Random

    def worker(self) -> WorkerProcess:
        """One that takes messages."""
        self.town.muster()
        self.town.ready()
        return self.rng.choice(self.town.workers)


Strike = Callable[[Scene], AbstractContextManager[None]]


# Workers


def _kill(worker: WorkerProcess, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(worker.pid, number)
    worker.process.wait()


@contextmanager
def child_killed(scene: Scene) -> Iterator[None]:
    """As by the out-of-memory killer."""
    _signal(scene.rng.sample(_children(scene.worker()) or [0], 1), signal.SIGKILL)
    yield


@contextmanager
def main_killed(scene: Scene) -> Iterator[None]:
    """Its pool must not go on by itself."""
    _kill(scene.worker())
    yield


@contextmanager
def worker_killed(scene: Scene) -> Iterator[None]:
    """As by a machine that loses power."""
    scene.worker().kill()
    yield


@contextmanager
def all_killed(scene: Scene) -> Iterator[None]:
    """And for a moment nobody is there to notice."""
    for worker in scene.town.workers:
        worker.kill()
    yield


@contextmanager
def frozen(scene: Scene) -> Iterator[None]:
    """Beyond its claim, and back: others have taken its jobs over."""
    worker = scene.worker()
    worker.signal_all(signal.SIGSTOP)
    try:
        time.sleep(CLAIM_S + scene.rng.uniform(0.5, 2.5))
        yield
    finally:
        worker.signal_all(signal.SIGCONT)


@contextmanager
def child_frozen(scene: Scene) -> Iterator[None]:
    """The same of one pool process, whose main process goes on."""
    found = scene.rng.sample(_children(scene.worker()) or [0], 1)
    _signal(found, signal.SIGSTOP)
    try:
        time.sleep(CLAIM_S + scene.rng.uniform(0.5, 2.5))
        yield
    finally:
        _signal(found, signal.SIGCONT)


def _signal(processes: list[int], number: int) -> None:
    for each in filter(None, processes):
        with suppress(ProcessLookupError):
            os.kill(each, number)


@contextmanager
def drained(scene: Scene) -> Iterator[None]:
    """SIGTERM: it hands over within its soft time-out, and ends in good order."""
    worker = scene.worker()
    worker.process.terminate()
    yield
    _ended(worker.process, "the drained worker", 0)


def _ended(process: subprocess.Popen[bytes], what: str, *fine: int) -> None:
    try:
        status = process.wait(120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{what} did not end in two minutes") from None
    assert status in fine, f"{what} ended with status {status}"


# The broker


@contextmanager
def broker_restarted(scene: Scene) -> Iterator[None]:
    """It keeps its append-only file."""
    scene.town.broker.stop()
    try:
        yield
    finally:
        scene.town.broker.start()


@contextmanager
def broker_killed(scene: Scene) -> Iterator[None]:
    """kill -9."""
    scene.town.broker.kill()
    try:
        yield
    finally:
        scene.town.broker.start()


@contextmanager
def broker_frozen(scene: Scene) -> Iterator[None]:
    """SIGSTOP, now and then for longer than claims last: nobody could renew one."""
    pid = scene.town.broker.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(scene.rng.choice([0.5, CLAIM_S + 1.0]))
    finally:
        os.kill(pid, signal.SIGCONT)
    yield


@contextmanager
def broker_paused(scene: Scene) -> Iterator[None]:
    """CLIENT PAUSE, by its administrator."""
    with _client(scene) as client:
        client.client_pause(round(scene.rng.uniform(0.5, CLAIM_S + 1.0) * 1000))
    yield


@contextmanager
def connections_dropped(scene: Scene) -> Iterator[None]:
    """All connections of all clients, by the broker."""
    with _client(scene) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    yield


@contextmanager
def messages_lost(scene: Scene) -> Iterator[None]:
    """Celery's lists are emptied again and again; the ledger stays."""
    lanes = [f"{scene.town.site.broker.prefix}ssvm.z.{lane}" for lane in _LANES]
    scene.mix.ask(2)
    with _client(scene) as client:
        for _ in range(10):
            client.delete(*lanes)
            time.sleep(0.02)
    yield


def _client(scene: Scene) -> redis.Redis:
    return scene.town.site.broker.client()


@contextmanager
def messages_doubled(scene: Scene) -> Iterator[None]:
    """Every doorbell of the round comes ten times more, and as a whole request too."""
    deeds = list(scene.mix.deeds)
    for deed in deeds:
        for number in range(10):
            request = deed.request | {"job_id": deed.job_id} if number % 2 else {"job_id": deed.job_id}
            scene.town.site.send(deed.job, request)
    yield


@contextmanager
def many_reapers(scene: Scene) -> Iterator[None]:
    """``ssvm reap`` three times at once, beside the workers' own."""
    command = [sys.executable, "-m", "ssvm_worker", "reap"]
    environ = {**os.environ, "SSVM_CONFIG": str(scene.town.site.file)}
    reapers = [subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL) for _ in range(3)]
    yield
    for each in reapers:
        _ended(each, "ssvm reap", 0, 75)


# The network


def _wired(hurt: Callable[[Scene, str], None], *names: str) -> Strike:
    @contextmanager
    def strike(scene: Scene) -> Iterator[None]:
        name = scene.rng.choice(names)
        hurt(scene, name)
        try:
            yield
        finally:
            scene.town.wires[name].heal()

    return strike


def _hold(scene: Scene, name: str) -> None:
    scene.town.wires[name].hold()
    time.sleep(scene.rng.uniform(0.5, 2.5))


def _slow(scene: Scene, name: str) -> None:
    scene.town.wires[name].rate = 200_000
    time.sleep(1.0)


_OTHERS = ("the vCenter", "the publisher")


@contextmanager
def stream_cut(scene: Scene) -> Iterator[None]:
    """The next disk that a host sends is cut off, or its lease ends."""
    what = scene.rng.choice(["cut", "end", "expire"])
    scene.town.vcenter_well(get={"do": what, "at": scene.rng.randrange(200_000), "times": 1})
    yield
    scene.town.vcenter_well()


# Disks and clocks


@contextmanager
def disk_full(scene: Scene) -> Iterator[None]:
    """The primary store has no room, or nearly none."""
    assert scene.town.disk
    scene.town.disk.fill(scene.rng.choice([0, 4096, 300_000]))
    try:
        time.sleep(scene.rng.uniform(0.3, 1.5))
        yield
    finally:
        scene.town.disk.empty()


@contextmanager
def workers_clock(scene: Scene) -> Iterator[None]:
    """The wall clock of all workers is set, and later put right."""
    scene.town.worker_clock.jump(3600 * scene.rng.choice(_HOURS))
    try:
        time.sleep(1.0)
        yield
    finally:
        scene.town.worker_clock.jump(0)


@contextmanager
def brokers_clock(scene: Scene) -> Iterator[None]:
    """The broker's wall clock is set, by which the ledger counts, and later put right."""
    scene.town.broker_clock.jump(3600 * scene.rng.choice(_HOURS))
    try:
        time.sleep(scene.rng.uniform(0.5, CLAIM_S + 1.0))
        yield
    finally:
        scene.town.broker_clock.jump(0)


# Jobs


@contextmanager
def poison(scene: Scene) -> Iterator[None]:
    """A job kills each worker process that runs it: it is given up, with the history of every attempt."""
    deed = scene.mix.download(6 * MiB)
    deed.request["stores"] = ["primary"]
    scene.mix.submit(deed)
    over = threading.Event()
    killer = threading.Thread(target=_kill_whoever_runs, args=(scene.town, deed, over), daemon=True)
    killer.start()
    ledger = scene.town.site.ledger
    try:
        until(lambda: ledger.get(deed.job_id).ended, f"the poison job {deed.job_id} is given up")
    finally:
        over.set()
        killer.join()
    record = ledger.get(deed.job_id)
    errors = [(each.error or {}).get("error") for each in record.attempts]
    assert record.state == "failed", record.state
    assert errors.count("WorkerLost") >= ATTEMPTS, errors
    assert all(each.worker and each.host and each.started and each.ended for each in record.attempts)
    yield


def _kill_whoever_runs(town: Town, deed: Deed, over: threading.Event) -> None:
    while not over.wait(0.05):
        record = town.site.ledger.get(deed.job_id)
        if record.state == "running" and not record.ending:
            children = [child for worker in town.workers for child in _children(worker)]
            _signal([each for each in children if _has_open(each, deed.artifact.prefix)], signal.SIGKILL)


def _children(worker: WorkerProcess) -> list[int]:
    """Its pool; none if it has just died."""
    with suppress(OSError):
        return worker.children()
    return []


def _has_open(process: int, place: str) -> bool:
    """Whether it has a file of that place of the directory store open."""
    with suppress(OSError):
        return any(place in os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir())
    return False


#: All of them, by what the table calls them.
FAULTS: dict[str, Strike] = {
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
    "network to S3 cut": _wired(lambda scene, name: scene.town.wires[name].cut(), "S3"),
    "network to S3 reset": _wired(lambda scene, name: scene.town.wires[name].reset(), "S3"),
    "network to S3 slow": _wired(_slow, "S3"),
    "network to S3 silent": _wired(_hold, "S3"),
    "network to a source cut": _wired(lambda scene, name: scene.town.wires[name].cut(), *_OTHERS),
    "network to a source reset": _wired(lambda scene, name: scene.town.wires[name].reset(), *_OTHERS),
    "network to a source silent": _wired(_hold, *_OTHERS),
    "a host's stream or lease ends early": stream_cut,
    "disk full": disk_full,
    "the workers' clock is set": workers_clock,
    "the broker's clock is set": brokers_clock,
    "a poison job": poison,
}


def unavailable(town: Town) -> dict[str, str]:
    """Faults that cannot be made here, and why."""
    found = {}
    if town.disk is None:
        found["disk full"] = "needs root, to mount a small file system"
    if not town.worker_clock.environ:
        found |= dict.fromkeys(["the workers' clock is set", "the broker's clock is set"], "needs a C compiler")
    return found
