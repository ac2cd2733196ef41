"""During any outage of the server no job hangs unnecessarily, and the object is complete or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from ssvm_worker.errors import StoreAway, StoreFull, StoreUnavailable
from ssvm_worker.stores.nfs.circuit_breaker import CLOSED, OPEN
from ssvm_worker.stores.nfs.commands import SystemCommands
from ssvm_worker.stores.nfs.probe import OK, probe
from ssvm_worker.stores.nfs.store import NfsStore
from ssvm_worker.streaming.interfaces import CHUNK, Owner
from tests.contracts.store import BIG, ME, SOME, fill, get, keys, put
from tests.nfs.server import Export, Server
from tests.waiting import PATIENCE_S, until

KEY = "template/tmpl/1/7/7.raw"
HALF = 5 * CHUNK


def is_whole(export: Export) -> None:
    """Return whether the object is on the server's own disk, with no other file beside it."""
    assert export.files() == [KEY]
    assert export.read(KEY) == BIG


def test_server_killed_in_a_write(server: Server) -> None:
    """A write whose server is killed waits, continues when the server is back, and commits all bytes."""
    export = server.export("back")
    with export.store().writer(KEY, owner=ME) as sink:
        fill(sink, BIG[:HALF])
        server.stop()
        rest = threading.Thread(target=lambda: fill(sink, BIG[HALF:]).commit())
        rest.start()
        server.start()
        rest.join()
    is_whole(export)


def test_worker_and_server_killed_in_a_write(server: Server) -> None:
    """A worker that hangs in a commit can be killed while its server is down, and the next attempt continues."""
    export = server.export("both")
    store = export.store()
    fork = multiprocessing.get_context("fork")
    written, go = fork.Event(), fork.Event()
    worker = fork.Process(target=_write, args=(export, written, go))
    worker.start()
    assert written.wait(PATIENCE_S)
    server.stop()
    go.set()
    until(lambda: _hangs(worker.pid), "the worker hangs in its commit")
    os.kill(worker.pid or 0, signal.SIGKILL)
    store.mounted.abort_requests(worker.pid or 0)
    worker.join(PATIENCE_S)
    assert worker.exitcode == -signal.SIGKILL
    server.start()
    assert keys(store) == []
    with store.writer(KEY, owner=Owner(ME.job_id, 2), resume=True) as sink:
        assert b"".join(sink.resumed()) == BIG[: sink.offset]
        fill(sink, BIG[sink.offset :]).commit()
    is_whole(export)


def _write(export: Export, written: Event, go: Event) -> None:
    with export.store().writer(KEY, owner=ME) as sink:
        fill(sink, BIG[:HALF])
        written.set()
        go.wait()
        fill(sink, BIG[HALF:]).commit()


def _hangs(pid: int | None) -> bool:
    """Return whether the process hangs in a call that only SIGKILL ends."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"


def test_hung_server(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The probe of a hung server is killed at its deadline, the breaker opens, and other stores work."""
    export = server.export("hung")
    put(export.store(mount_root=tmp_path / "nfs"), KEY, BIG)
    server.hang()
    store = export.store(mount_root=tmp_path / "nfs", probe_s=1.0)
    for call in (lambda: keys(store), lambda: get(store, KEY), lambda: put(store, "other", b"2"), store.usage):
        with pytest.raises(StoreAway, match=r"away since \d\d:\d\d:\d\d UTC: no answer within 1 s .*:/hung"):
            call()
    assert looking_at(store) == []
    assert store.mounted.health.read().breaker.state == OPEN

    from ssvm_worker.cli import main  # seconds, in a VM

    config = tmp_path / "worker.toml"
    (tmp_path / "other").mkdir()
    config.write_text(
        f'state_dir = "{tmp_path}"\n[nfs]\nprobe_s = 30\n[stores.primary]\nurl = "{export.url}"\n'
        f'[stores.other]\nurl = "file://{tmp_path}/other"\n'
    )
    assert main(["stores", "--json", "--config", str(config)]) == 75
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    # On a slow machine the next trial is due, and the command does not wait for its end.
    assert rows["primary"]["state"] == "down"
    assert rows["primary"]["breaker"] in ("open", "half-open")
    assert "no answer within 1 s" in rows["primary"]["reason"]
    assert rows["other"]["state"] == "up"

    server.go_on()
    until(lambda: answers(export.store(mount_root=tmp_path / "nfs")), "the store answers again, without anybody's help")
    is_whole(export)

    def shown() -> int:
        capsys.readouterr()
        return main(["stores", "--json", "--config", str(config)])

    until(lambda: shown() == 0, "the command finds the store")
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["primary"]["state"], rows["primary"]["breaker"]) == ("up", "closed")


def test_others_beside_a_hung_write(server: Server) -> None:
    """A process with writes to a hung server still probes that and other servers within the deadline."""
    export = server.export("dirty")
    with export.store().writer(KEY, owner=ME) as sink:
        fill(sink, BIG[:HALF])
        server.hang()
        with pytest.raises(StoreAway, match="no answer within 1 s"):
            keys(export.store(probe_s=1.0))
        assert probe("/", PATIENCE_S).state == OK
        child = threading.Thread(target=subprocess.run, args=(["true"],))
        child.start()  # it may have to wait, but no other store waits with it
        assert probe("/", PATIENCE_S).state == OK
        server.go_on()
        child.join()
        fill(sink, BIG[HALF:]).commit()
    is_whole(export)


def looking_at(store: NfsStore) -> list[str]:
    """Return the running probes of that store."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(each.read_text().replace("\0", " "))
        except OSError:
            continue
    return [each for each in found if "stat " in each and str(store.mounted.paths.point) in each]


def answers(store: NfsStore) -> bool:
    """Return whether the store can be used, as far as its breaker allows."""
    try:
        return get(store, KEY) == BIG
    except StoreAway:
        return False


@dataclass(frozen=True)
class Counting(SystemCommands):
    """The machine's commands, with a count of their effects."""

    done: list[str] = field(default_factory=list)

    def mount(self, source: str, point: str, options: str, held: int) -> None:
        super().mount(source, point, options, held)
        self.done.append("mount")

    def unmount(self, point: str, held: int, *, lazily: bool = False) -> None:
        super().unmount(point, held, lazily=lazily)
        self.done.append("umount -l" if lazily else "umount")


def test_stale_handles(server: Server) -> None:
    """A server that lost its handles is unmounted once, lazily, and mounted once, and then works."""
    export, counting = server.export("stale"), Counting()
    first = export.store(commands=counting)
    put(first, KEY, BIG)
    sink = fill(first.writer("a/other", owner=ME), SOME)
    marker = export.read(".ssvm-store")
    export.withdraw()
    export.unmount()
    export.mount()  # as restored from a backup: the same files, other handles
    export.put(".ssvm-store", marker)
    export.put(KEY, BIG)
    export.offer(1000 + export.number)
    with pytest.raises(StoreUnavailable):
        sink.commit()
    sink.abort()
    store = export.store(commands=counting)
    assert get(store, KEY) == BIG
    assert counting.done == ["mount", "umount -l", "mount"]
    assert store.mounted.health.read().breaker.state == CLOSED
    put(first, "a/other", SOME)
    assert export.files() == ["a/other", KEY]


def test_full_disk(server: Server) -> None:
    """A disk that fills up, which NFS reports late, fails the job permanently and loses no other byte."""
    export = server.export("full", size="8m")
    store = export.store()
    put(store, "a/neighbour", SOME)
    with pytest.raises(StoreFull, match="The store is full"):
        put(store, KEY, BIG)
    with pytest.raises(StoreFull, match="do not fit"):
        store.writer(KEY, len(BIG), owner=ME)
    assert export.files() == ["a/neighbour"]
    until(lambda: export.free() > 0.5, "the server frees the blocks of the deleted file")
    put(store, KEY, SOME)
    assert get(store, KEY) == SOME
    assert get(store, "a/neighbour") == SOME
