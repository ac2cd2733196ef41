"""Commands of root leave no file in the state directory that the worker's user cannot use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssvm_worker.stores.ownership import give_to_owner
from tests.neighbours import ROOT, free_port
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
#: The id of a user that owns nothing else.
_USER = 64999


def test_stores_as_root(tmp_path: Path) -> None:
    """`ssvm stores` of root gives what it creates to the owner of the state directory, also if the mount fails."""
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, _USER, _USER)
    file = tmp_path / "worker.toml"
    url = f"nfs://127.0.0.1:{free_port()}/export"
    file.write_text(f'state_dir = "{state}"\n[stores.a]\nurl = "{url}"\n[nfs]\nmount_s = 5\n')
    command = [sys.executable, "-m", "ssvm_worker", "stores", "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    created = {str(each.relative_to(state)): each.stat().st_uid for each in state.rglob("*")}
    assert any(each.endswith(".users") for each in created), done.stdout + done.stderr
    assert set(created.values()) == {_USER}, created


def test_files_with_two_names(tmp_path: Path) -> None:
    """A file with a second name stays root's, because the second name may be that of a system file."""
    os.chown(tmp_path, _USER, _USER)
    for name in ("one", "two"):
        (tmp_path / name).touch()
    (tmp_path / "link").hardlink_to(tmp_path / "two")
    for name in ("one", "two"):
        give_to_owner(tmp_path / name)
    assert [(tmp_path / name).stat().st_uid for name in ("one", "two")] == [_USER, 0]
