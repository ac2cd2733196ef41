"""The helper process that runs commands without the files of its parent, and with a deadline."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from ssvm_worker.stores.nfs import command_process as nfs_helper
from ssvm_worker.stores.nfs.command_process import CommandHelper, CommandResult
from tests.waiting import PATIENCE_S, until


def shell(script: str, deadline_s: float = PATIENCE_S, held: int | None = None) -> CommandResult:
    return nfs_helper.run(["sh", "-c", script], deadline_s, held)


def test_how_it_ended() -> None:
    """Status, output and errors are returned, in English for any locale."""
    assert shell("echo out; echo wrong >&2; exit 3") == CommandResult(3, "out\n", "wrong\n")
    assert shell("echo $LC_ALL").out == "C\n"


def test_no_such_command() -> None:
    """A missing program is a failure like any other."""
    found = nfs_helper.run(["/no/such/program"], PATIENCE_S)
    assert (found.code, "No such file" in found.err) == (127, True)


def test_deadline(tmp_path: Path) -> None:
    """A command that exceeds its deadline is killed with its children, while others continue."""
    pids = tmp_path / "pids"
    assert shell(f"sleep 1000 & echo $$ $! > {pids}; wait", 1.0) == CommandResult(None)
    for pid in pids.read_text().split():
        until(lambda pid=pid: _has_ended(int(pid)), "it was killed")  # type: ignore[misc]
    assert shell("echo on").out == "on\n"


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def test_lock_is_held(tmp_path: Path) -> None:
    """A lock that is passed to a command is held while the command runs."""
    with open(tmp_path / "lock", "w") as file, open(tmp_path / "lock", "w") as another:
        fcntl.flock(file, fcntl.LOCK_EX)
        held = shell(f"flock -n {tmp_path}/lock true || echo held; ls /proc/self/fd | wc -l", held=file.fileno())
        assert held.out.splitlines()[0] == "held"
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_none_of_our_files(tmp_path: Path) -> None:
    """A file that was opened after the helper's start is not open in a command, and is not closed."""
    nfs_helper.start()
    with open(tmp_path / "object", "w") as file:
        os.set_inheritable(file.fileno(), True)
        assert str(tmp_path) not in shell("ls -l /proc/self/fd /proc/$PPID/fd").out


def test_helper_that_was_killed() -> None:
    """A killed helper is started again, and the new one gets the last command."""
    helper = int(shell("echo $PPID").out)
    os.kill(helper, signal.SIGKILL)
    until(lambda: _has_ended(helper), "it was killed")
    assert shell("echo again").out == "again\n"


def test_helper_ends_with_its_process() -> None:
    """When a process ends in any way, its helper ends too."""
    code = (
        "import os\nfrom ssvm_worker.stores.nfs import command_process\n"
        "print(command_process.run(['sh', '-c', 'echo $PPID'], 60).out, flush=True)\nos.kill(os.getpid(), 9)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    until(lambda: _has_ended(int(said)), "the helper has ended")


def test_a_fork_has_its_own() -> None:
    """A forked process does not use or end its parent's helper."""
    first = nfs_helper.start()
    assert isinstance(first, CommandHelper)
    child = os.fork()
    if not child:
        os._exit(nfs_helper.start() is first)
    assert os.waitpid(child, 0)[1] == 0
    assert nfs_helper.start() is first
