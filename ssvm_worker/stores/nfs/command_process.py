"""Commands that are run by a process of their own, which has no file of an export open.

A child has its parent's files until its exec is done, and closes them then. To close a file of NFS that was written to
is to wait for its server. So a child of a process that writes to a dead server hangs before it has begun, whatever it
was to do; and with vfork, which lasts until the exec, its parent stands still with all its threads. The helper is
started before the first export is opened, and answers on a socket for each command.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
#: Seconds that a killed process gets to be gone, and that the helper gets beyond the deadline.
_FAREWELL_S = 1.0
_MARGIN_S = 10.0
_LARGEST = 64 * 1024
#: Seconds between two looks at *check*, and before the first: a clean-up after a cancel uses the same store.
_TICK_S = 0.25
GRACE_S = 1.5


@dataclass(frozen=True)
class CommandResult:
    """How a command ended."""

    #: None: it has not, within its deadline, and was killed or, where it cannot be, left alone.
    code: int | None
    out: str = ""
    err: str = ""


class CommandHelper:
    """The process, from the side of whoever wants something run. Safe in several threads."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Not of the worker's group: what ends that by a signal from a terminal must not end an unmount half-way.
            subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    def run(
        self,
        command: Sequence[str],
        deadline_s: float,
        held: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> CommandResult:
        """Run it; *held* is an open file that stays open as long as it lives. OSError when the helper is gone.

        What *check* raises while the command runs is raised; the command goes on to its deadline.
        """
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            with theirs:
                files = [theirs.fileno(), *([held] if held is not None else [])]
                order = json.dumps({"command": list(command), "deadline_s": deadline_s}).encode()
                socket.send_fds(self._control, [order], files)
            if not (answer := _answer(mine, deadline_s + _FAREWELL_S + _MARGIN_S, check)):
                raise ConnectionResetError("The helper that runs commands has ended")
            return CommandResult(**json.loads(answer))


def _answer(mine: socket.socket, limit_s: float, check: Callable[[], None] | None) -> bytes:
    """What the helper says; empty if it has ended; TimeoutError."""
    began = time.monotonic()
    while True:
        mine.settimeout(min(_TICK_S, limit_s) if check else limit_s)
        try:
            return mine.recv(_LARGEST)
        except TimeoutError:
            waited = time.monotonic() - began
            if check is None or waited > limit_s:
                raise
            if waited > GRACE_S:
                check()


_lock = threading.Lock()
_helper: tuple[int, CommandHelper] | None = None


def start() -> CommandHelper:
    """This process's helper; call it before the first file of an export is opened."""
    global _helper
    # A child that this process starts all the same, qemu-img say, then holds up its own thread only.
    subprocess._USE_VFORK = False  # type: ignore[misc]  # it is for users to set, by the docs
    with _lock:
        if _helper is None or _helper[0] != os.getpid():
            _helper = (os.getpid(), CommandHelper())
        return _helper[1]


def run(
    command: Sequence[str], deadline_s: float, held: int | None = None, check: Callable[[], None] | None = None
) -> CommandResult:
    """See Helper.run. A helper that has ended, killed for want of memory perhaps, is started once more."""
    try:
        return start().run(command, deadline_s, held, check)
    except TimeoutError:
        return CommandResult(None)
    except OSError:
        _forget()
        return start().run(command, deadline_s, held, check)


def _forget() -> None:
    global _helper
    with _lock:
        _helper = None


# The side of the process itself; it has nothing but the standard library.


def _serve(control: socket.socket) -> None:
    while True:
        order, files, *_ = socket.recv_fds(control, _LARGEST, 2)
        if not order:
            return  # nobody wants anything more; what runs is waited for by its threads
        threading.Thread(target=_obey, args=(json.loads(order), files)).start()


def _obey(order: dict[str, Any], files: list[int]) -> None:
    with socket.socket(fileno=files[0]) as answers:
        try:
            ran = _run(order["command"], order["deadline_s"], files[1:])
        except OSError as error:
            ran = {"code": 127, "err": str(error)}
        for each in files[1:]:
            os.close(each)
        with contextlib.suppress(OSError):
            answers.send(json.dumps(ran).encode())


def _run(command: list[str], deadline_s: float, held: list[int]) -> dict[str, Any]:
    # What they say is matched, so it must not come in the administrator's language. In a session of its own, killed
    # whole: a mount.nfs that is merely left alone goes on, and mounts in the end.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        pass_fds=held,
        env={"PATH": _PATH, "LC_ALL": "C"},
    )
    try:
        out, err = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_FAREWELL_S)  # not for ever: one in the kernel's hands may never end
        return {"code": None}
    shown = (each.decode(errors="replace")[-4096:] for each in (out, err))
    return {"code": child.returncode, **dict(zip(("out", "err"), shown, strict=True))}


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
