"""An NFS store whose server hangs, or has lost the client's state: no job waits, and the store is used again later."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.cli import main
from ssvm_worker.config import load
from ssvm_worker.errors import StoreAway
from ssvm_worker.operations.mounts import nfs_mounts, stores_away
from ssvm_worker.stores.nfs import commands
from ssvm_worker.stores.nfs.circuit_breaker import CLOSED, OPEN
from ssvm_worker.stores.nfs.health import SharedExportHealth
from ssvm_worker.stores.nfs.mountinfo import mounts
from ssvm_worker.stores.nfs.probe import FAILED, HUNG, OK, STALE, ProbeResult, probe
from ssvm_worker.stores.nfs.store import NfsSettings, NfsStore
from ssvm_worker.wiring import stores as wired_stores
from tests.contracts.store import get, keys, put
from tests.servers.exports import ADDRESS, MemoryExports, memory_exports
from tests.waiting import PATIENCE_S

SOURCE = f"{ADDRESS}:/export"


@pytest.fixture
def exports(tmp_path: Path) -> Iterator[MemoryExports]:
    with memory_exports(tmp_path / "exports") as given:
        yield given


def open_store(exports: MemoryExports, probe_s: float = PATIENCE_S) -> NfsStore:
    """Return a separate store, as another process would have it."""
    settings = NfsSettings(exports.root.parent / "mounts", mount_s=20.0, probe_s=probe_s)
    return NfsStore("primary", f"nfs://{ADDRESS}/export", settings, exports)


@pytest.fixture
def stored(exports: MemoryExports) -> Path:
    """Return the mountpoint of a store with an object."""
    store = open_store(exports)
    put(store, "object", b"1")
    return store.mounted.paths.point


def ended(pid: int) -> bool:
    """Return whether the process has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def test_probe(tmp_path: Path) -> None:
    """A probe reports latency and usage, or the reason of a failure."""
    found = probe(str(tmp_path), PATIENCE_S)
    assert found.state == OK
    assert found.usage
    assert found.usage[0] > 0
    assert probe(str(tmp_path / "none"), 30.0) == ProbeResult(FAILED, "No such file or directory")


def test_probe_that_hangs(tmp_path: Path) -> None:
    """A child that exceeds its deadline is killed with its children."""
    pids = tmp_path / "pids"
    found = probe("/", 1.0, ["sh", "-c", f"sleep 1000 & echo $$ $! > {pids}; wait"])
    assert found == ProbeResult(HUNG, "no answer within 1 s")
    first, second = map(int, pids.read_text().split())
    while not (ended(first) and ended(second)):
        time.sleep(0.05)  # a kill is asynchronous, and takes a while on a busy machine


def test_probe_of_another_mind(tmp_path: Path) -> None:
    """A child with other output has failed."""
    assert probe(str(tmp_path), PATIENCE_S, ["echo", "[]"]).state == FAILED
    assert probe(str(tmp_path), PATIENCE_S, ["false"]).state == FAILED


def test_hung_server(exports: MemoryExports, stored: Path) -> None:
    """A server that does not answer makes the store absent, with reason and time, and no call hangs."""
    exports.die(SOURCE, str(stored))
    store = open_store(exports, probe_s=1.0)
    for call in (lambda: keys(store), lambda: get(store, "object"), lambda: put(store, "other", b"2"), store.usage):
        with pytest.raises(StoreAway, match=r"away since \d\d:\d\d:\d\d UTC: no answer within 1 s .*:/export"):
            call()
    assert store.mounted.health.read().breaker.state == OPEN


def test_others_do_not_try(exports: MemoryExports, stored: Path) -> None:
    """While a breaker is open, no other process tries the store."""
    exports.die(SOURCE, str(stored))
    with pytest.raises(StoreAway):
        keys(open_store(exports, probe_s=1.0))
    # This process's probe would take longer than a test may.
    with pytest.raises(StoreAway):
        keys(open_store(exports, probe_s=100_000.0))


def test_stale_handles(exports: MemoryExports, stored: Path) -> None:
    """A mount with stale handles is replaced once, and the call continues."""
    exports.die(SOURCE, str(stored))
    exports.forget()
    assert probe(str(stored), PATIENCE_S).state == STALE
    store = open_store(exports)
    assert get(store, "object") == b"1"
    assert len(exports.mounted) == 2
    assert store.mounted.health.read().breaker.state == CLOSED


def test_answers_again(exports: MemoryExports, stored: Path) -> None:
    """When the server is back and the next trial is due, the store works again."""
    exports.die(SOURCE, str(stored))
    store = open_store(exports, probe_s=1.0)
    with pytest.raises(StoreAway):
        keys(store)
    exports.forget()
    store = open_store(exports)
    store.mounted.health = SharedExportHealth(store.mounted.paths.file("health"), SOURCE, clock=lambda: 1e12)
    assert list(keys(store)) == ["object"]
    assert store.mounted.health.read().breaker.state == CLOSED


def test_unmounted_while_away(exports: MemoryExports, stored: Path) -> None:
    """At a worker's end a mount of an absent server is removed without a wait for the server."""
    exports.die(SOURCE, str(stored))
    store = open_store(exports, probe_s=1.0)
    with pytest.raises(StoreAway):
        keys(store)
    store.mounted.release()
    assert store.mounted.unmount_unused()
    assert str(stored) not in {each.point for each in mounts()}


def test_look(exports: MemoryExports, stored: Path) -> None:
    """The worker's own probes store latency and usage for all processes."""
    store = open_store(exports)
    store.mounted.refresh_health()
    health = store.mounted.health.read()
    assert health.usage
    assert health.latency_s > 0
    assert stored.exists()


def test_half_a_file(tmp_path: Path) -> None:
    """A malformed health file means that nothing is known."""
    place = tmp_path / "x.health"
    place.write_text('{"breaker": {"state"')
    health = SharedExportHealth(place, SOURCE)
    health.begin(1.0)
    health.note(ProbeResult(HUNG, "no answer"))
    with pytest.raises(StoreAway, match="no answer"):
        health.begin(1.0)
    assert os.listdir(tmp_path)


def test_one_try(tmp_path: Path) -> None:
    """When an open breaker is due, one process may try, and another is refused meanwhile."""
    now = [1000.0]
    health = SharedExportHealth(tmp_path / "x.health", SOURCE, clock=lambda: now[0])
    health.fail("it cannot be mounted")
    now[0] = 1005.0
    health.begin(10.0)
    with pytest.raises(StoreAway):
        health.begin(10.0)
    health.note(ProbeResult(OK, usage=(3, 2, 1)))
    health.begin(10.0)
    assert health.read().usage == (3, 2, 1)


def test_stores_and_workers_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ssvm stores` and workers show the breaker's state, reason and time without waits."""
    config = tmp_path / "worker.toml"
    config.write_text(f'state_dir = "{tmp_path}"\n[stores.primary]\nurl = "nfs://{ADDRESS}/export"\n')
    settings = load(config, {})
    assert stores_away(settings) == {}
    (tmp_path / "nfs").mkdir()
    nfs_mounts(settings)[0].health.fail("no answer")
    assert stores_away(settings)["primary"].startswith("open since ")
    assert main(["stores", "--json", "--config", str(config)]) == 75
    [row] = json.loads(capsys.readouterr().out)
    assert (row["state"], row["breaker"]) == ("down", "open")
    assert row["reason"].endswith(": no answer")
    assert "no answer" in row["error"]


def test_wrong_url_ends_the_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker with a wrong URL in its settings does not start, and the error lists the options."""
    config = tmp_path / "worker.toml"
    config.write_text(f'[stores.primary]\nurl = "nfs://{ADDRESS}/export?exec"\n')
    assert main(["worker", "--config", str(config)]) == 2
    assert "Allowed are: vers" in capsys.readouterr().err


def test_stores_does_not_wait_for_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ssvm stores` shows a store whose first mount hangs as down, and the others as they are."""
    pid, tool = tmp_path / "pid", tmp_path / "mount.nfs"
    tool.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 1000\n")
    tool.chmod(0o755)
    monkeypatch.setattr(commands, "_SBIN", str(tmp_path))
    monkeypatch.setattr(commands.os, "geteuid", lambda: 0)
    monkeypatch.setattr(wired_stores, "_ANSWER_S", 0.1)
    config = tmp_path / "worker.toml"
    hanging = f'[stores.remote]\nurl = "nfs://{ADDRESS}/export"\n[nfs]\nmount_s = {PATIENCE_S}\n'
    config.write_text(f'state_dir = "{tmp_path}"\n{hanging}[stores.here]\nurl = "file://{tmp_path}"\n')
    try:
        assert main(["stores", "--config", str(config)]) == 75
    finally:
        with contextlib.suppress(OSError, ValueError):  # the command may not have written it yet
            os.kill(int(pid.read_text()), signal.SIGKILL)
    shown = capsys.readouterr().out
    assert re.search(r"remote .*down .*has not answered within 0.1 s", shown)
    assert re.search(r"here .* up ", shown)
    assert nfs_mounts(load(config, {}))[0].health.read().breaker.state == CLOSED
