"""Commands that run as root for a mount: only for the intended process, and with the reason of each error."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from ssvm_worker.errors import Cancelled, ConfigError, ResourceBusy
from ssvm_worker.stores.nfs import commands, mount
from ssvm_worker.stores.nfs.commands import SystemCommands, abort_script, start_time
from tests.neighbours import open_handles
from tests.waiting import PATIENCE_S

_SUDO = """#!/bin/sh
echo 'sudo: The "no new privileges" flag is set, which prevents sudo from running as root.' >&2
echo 'sudo: If sudo is running in a container, you may need to adjust the container configuration.' >&2
exit 1
"""


def test_start_time() -> None:
    """A process is identified by its start time, for any name, and an ended one has none."""
    with subprocess.Popen(["/bin/bash", "-c", "exec -a 'a) 1 (b' sleep 600"]) as process:
        started = start_time(process.pid)
        assert started.isdigit()
        assert started == start_time(process.pid)
        process.kill()
    assert start_time(process.pid) == ""


@pytest.mark.parametrize("reused", [False, True], ids=["the same process", "another one of that number"])
def test_let_die(tmp_path: Path, reused: bool) -> None:
    """Calls fail while exactly that process lives, and never those of another with its number."""
    mark = tmp_path / "failed"
    with subprocess.Popen(["sleep", "600"]) as process:
        started = start_time(process.pid)
        script = abort_script(process.pid, f"{int(started) - 1}" if reused else started, f"touch {mark}", tries=1)
        subprocess.run(["sh", "-c", script], check=False)
        process.kill()
    assert mark.exists() is not reused


def test_the_reason_of_sudo_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sudo's first line is the reason, and the remedy names the unit's flag and the documentation."""
    (tmp_path / "sudo").write_text(_SUDO)
    (tmp_path / "sudo").chmod(0o755)
    (tmp_path / "point").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    held = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ConfigError, match="no new privileges") as refused:
        SystemCommands().mount("127.0.0.1:/export", str(tmp_path / "point"), "port=2049", held)
    os.close(held)
    assert "NoNewPrivileges" in refused.value.remedy
    assert "docs/how-to/nfs.md" in refused.value.remedy
    assert stat.S_ISDIR((tmp_path / "point").stat().st_mode)


def test_a_cancel_ends_the_wait_for_a_mount(tmp_path: Path) -> None:
    """A cancel ends the wait for another process's mount, and leaves no handle open."""
    path, cancelled = tmp_path / "lock", threading.Event()

    def check() -> None:
        cancelled.set()
        raise Cancelled("user")

    holder = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    before = open_handles(tmp_path)
    with pytest.raises(Cancelled):
        mount._lock(path, fcntl.LOCK_EX, PATIENCE_S, check)
    with pytest.raises(ResourceBusy):
        mount._lock(path, fcntl.LOCK_EX, 0, check)
    assert open_handles(tmp_path) == before
    os.close(holder)


def test_a_cancel_ends_the_wait_for_a_command(tmp_path: Path) -> None:
    """A cancel ends the wait for a mount or a probe, and the command continues to its own deadline."""

    def check() -> None:
        raise Cancelled("user")

    with pytest.raises(Cancelled):
        commands.command_process.run(["sleep", "30"], 30, check=check)
