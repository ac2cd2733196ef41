"""`ssvm run` and `ssvm delete` beside workers: a foreground job holds the ledger's lock, or does not start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cli import main
from ssvm_worker.cli.run import machine_lock
from ssvm_worker.config import load
from ssvm_worker.errors import ResourceBusy
from ssvm_worker.jobs import find_job
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.wiring.assembly import new_job, open_ledger
from tests import images
from tests.grain_bench import OWNER, back_up, changed, disk
from tests.servers.broker import Broker
from tests.servers.http import HttpServer
from tests.waiting import PATIENCE_S, until

Run = Callable[..., tuple[int, Any]]
NAMES = {"kind": "backup", "account": "acme", "volume": "vol1", "id": "b1"}
PLACE = "snapshots/acme/vol1/b1"
NOWHERE = "redis://127.0.0.1:1/0"
OPTIONS = [word for name, value in NAMES.items() for word in (f"--{name}", value)]
BACKUP = [*OPTIONS[2:], "--vcenter", "vc1", "--vm", "vm-1"]
#: All commands that delete or write objects that the backups of a volume share.
COMMANDS = {
    "delete": ["delete", PLACE, "--store", "primary"],
    "run delete": ["run", "delete", *OPTIONS],
    "run copy": ["run", "copy", *OPTIONS, "--source", "primary", "--stores", "archive"],
    "run copy --move": ["run", "copy", *OPTIONS, "--source", "primary", "--stores", "archive", "--move"],
    "run backup": ["run", "backup", *BACKUP, "--mode", "incremental"],
    "run cleanup": ["run", "cleanup", "--volume", "snapshots/acme/vol1"],
}


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """Return a store with two incremental backups of one volume."""
    (tmp_path / "store").mkdir()
    store = FileStore("primary", tmp_path / "store")
    for id_, raw in {"b1": disk(24), "b2": changed(disk(24), 3, 7)}.items():
        back_up(store, id_, raw)
    return store


@pytest.fixture
def ssvm(tmp_path: Path, store: FileStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with ``--json``, and return its exit status and its parsed output."""
    (tmp_path / "archive").mkdir()
    monkeypatch.setenv("SSVM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", f"file://{tmp_path}/store")
    monkeypatch.setenv("SSVM_STORES__ARCHIVE__URL", f"file://{tmp_path}/archive")
    monkeypatch.setenv("SSVM_DOWNLOAD__ALLOW_NETWORKS", "127.0.0.0/8")
    for key, value in {"HOST": "127.0.0.1", "USERNAME": "u", "PASSWORD": "p"}.items():
        monkeypatch.setenv(f"SSVM_VCENTERS__VC1__{key}", value)

    def run(*argv: str) -> tuple[int, Any]:
        status = main([*argv, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, broker: Broker) -> Ledger:
    """Return the ledger of a real broker, which the settings name."""
    monkeypatch.setenv("SSVM_BROKER__URL", broker.url)
    monkeypatch.setenv("SSVM_BROKER__PREFIX", broker.prefix)
    return open_ledger(load())


def there(store: FileStore) -> dict[str, bytes]:
    """Return every file of the store, including hidden ones."""
    return {str(each): each.read_bytes() for each in store._tree.root.rglob("*") if each.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_waits_for_a_worker(ssvm: Run, ledger: Ledger, store: FileStore, command: str) -> None:
    """No foreground command changes a volume while a worker's job holds its lock."""
    new = new_job(load(), find_job("backup"), {**NAMES, "id": "b3", "vcenter": "vc1", "vm": "vm-1"}, default_id="w")
    ledger.submit(new)
    assert ledger.claim("w", "a worker")
    with store.writer("snapshots/acme/vol1/packs/new.pack", owner=OWNER) as part:
        part.write(b"a pack under way")
        before = there(store)
        status, error = ssvm(*COMMANDS[command])
        assert (status, error["error"], error["where"]) == (75, "ResourceBusy", "snapshots/acme/vol1")
        assert there(store) == before


@pytest.mark.parametrize("command", [each for each in COMMANDS if each != "run cleanup"])
def test_refuses_without_the_lock(ssvm: Run, store: FileStore, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """If the configured broker is away, jobs that could damage backups are refused, and the error names --force."""
    monkeypatch.setenv("SSVM_BROKER__URL", NOWHERE)
    before = there(store)
    status, error = ssvm(*COMMANDS[command])
    assert (status, error["error"], error["where"]) == (75, "StoreUnavailable", "snapshots/acme/vol1")
    assert "--force" in error["remedy"]
    assert there(store) == before


@pytest.mark.parametrize("how", ["forced", "no broker in the settings", "embedded"])
def test_goes_on_without_a_broker(
    ssvm: Run, store: FileStore, monkeypatch: pytest.MonkeyPatch, how: str, tmp_path: Path
) -> None:
    """The host's own lock is enough with --force, and where the settings name no shared broker."""
    if how != "no broker in the settings":
        monkeypatch.setenv("SSVM_BROKER__URL", NOWHERE if how == "forced" else "embedded")
    options = ["--force"] if how == "forced" else []
    assert ssvm(*COMMANDS["delete"], *options)[0] == 0
    assert [each for each in there(store) if PLACE in each] == []


def test_other_jobs_need_no_broker(ssvm: Run, monkeypatch: pytest.MonkeyPatch, http_server: HttpServer) -> None:
    """Jobs that share nothing with other artifacts run without the broker."""
    monkeypatch.setenv("SSVM_BROKER__URL", NOWHERE)
    url = http_server.serve("image", images.qcow2())
    assert ssvm("run", "download", "--url", url, "--account", "2", "--id", "7")[0] == 0
    assert ssvm("delete", "template/tmpl/2/7", "--store", "primary")[0] == 0


def test_the_ledger_knows_it(ssvm: Run, ledger: Ledger, http_server: HttpServer, tmp_path: Path) -> None:
    """A running foreground job has a record and a lock; a cancel stops it and releases both."""
    url = http_server.serve("image", images.mbr(1 << 20), stall_after=1000)
    request = {"url": url, "account": "2", "id": "7"}
    argv = [word for name, value in request.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", "download", *argv, "--job-id", "here"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        assert http_server.stalled.wait(PATIENCE_S)
        ledger.submit(new_job(load(), find_job("download"), request, default_id="w"))
        assert ledger.get("here").state == "running"
        assert ledger.claim("w", "a worker") is None
        assert ssvm("cancel", "here")[0] == 0
        assert process.wait(PATIENCE_S) == 130
    until(lambda: ledger.get("here").state == "cancelled", "its record has ended")
    assert ledger.claim("w", "a worker")
    assert not (tmp_path / "store/template").exists()


def test_a_bug_frees_the_lock(ssvm: Run, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreground job that ends by a bug is failed in the ledger, and its lock is released."""
    monkeypatch.setattr("ssvm_worker.jobs.delete.job.run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ssvm("run", "delete", *OPTIONS, "--job-id", "here")
    record = ledger.get("here")
    assert (record.state, "ZeroDivisionError" in str(record.error)) == ("failed", True)


def test_machine_lock() -> None:
    """Without a broker too, one foreground job at a time writes a resource of the same stores."""
    stores = ["file:///srv/secondary"]
    with machine_lock("template/tmpl/2/7", stores):
        with pytest.raises(ResourceBusy, match="Another `ssvm run`"), machine_lock("template/tmpl/2/7", stores):
            pass
        with machine_lock("template/tmpl/2/8", stores), machine_lock("template/tmpl/2/7", ["file:///other"]):
            pass
    with machine_lock("template/tmpl/2/7", stores):
        pass
