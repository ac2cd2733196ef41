"""Screenshots of booted backups: each exists exactly as long as a store has its backup."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.cleanup import job as cleanup
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.verify.screenshots import screenshot_path
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from tests.attempts import attempt
from tests.backups import BACKUP, store_backup

ASKED = {"kind": "backup", "account": "acme", "volume": "vol1", "id": "b1"}


class Machine:
    """Two stores with a backup, and a machine that has booted it."""

    def __init__(self, folder: Path) -> None:
        self.boots = folder / "boot"
        (folder / "archive").mkdir()
        self.primary, self.archive = MemoryStore("primary"), FileStore("archive", folder / "archive")
        for store in (self.primary, self.archive):
            store_backup(store, bytes(1 << 16))
        self.screen = screenshot_path(folder / "boot", BACKUP)
        self.screen.parent.mkdir(parents=True)
        self.screen.write_bytes(b"a picture")

    def attempt(self) -> Attempt:
        """Return an attempt on that machine."""
        return attempt(self.primary, self.archive, settings={"boot": {"dir": self.boots}})

    def delete(self, *stores: str) -> None:
        """Delete the backup on these stores."""
        delete.run(parse_request(delete.Request, ASKED | {"stores": stores}, "delete"), self.attempt())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return two stores with a backup, and its screenshot."""
    return Machine(tmp_path)


def test_goes_with_the_backup(machine: Machine) -> None:
    """The screenshot is deleted when the last store has lost the backup."""
    machine.delete("primary")
    assert machine.screen.exists()
    machine.delete("archive")
    assert not machine.screen.exists()


def test_store_away(machine: Machine, tmp_path: Path) -> None:
    """If a store cannot say whether it has the backup, the screenshot stays, and the deletion succeeds."""
    (tmp_path / "archive").rename(tmp_path / "elsewhere")
    machine.delete("primary")
    assert machine.screen.exists()


@pytest.mark.parametrize("volume", ["", "snapshots/acme/vol1", "snapshots/acme/vol2"])
def test_cleanup(machine: Machine, volume: str) -> None:
    """Clean-up deletes and reports screenshots of backups that another machine deleted, for its volume only."""
    others = [machine.screen.with_name("no backup's.png"), machine.screen.with_name("notes.txt")]
    for each in others:
        each.write_bytes(b"somebody's")
    machine.boots = machine.screen.parents[3] / "of another machine"
    machine.delete("primary", "archive")
    machine.boots = machine.screen.parents[3]
    request = {"volume": volume, "dry_run": True}
    told = cleanup.run(parse_request(cleanup.Request, request, "cleanup"), machine.attempt())
    assert machine.screen.exists()
    done = cleanup.run(parse_request(cleanup.Request, request | {"dry_run": False}, "cleanup"), machine.attempt())
    goes = not volume.endswith("vol2")
    assert machine.screen.exists() is not goes
    assert told["found"] == done["found"]
    assert (done["counts"], done["bytes"]) == (({"screenshot": 1}, 9) if goes else ({}, 0))
    assert all(each.exists() for each in others)
