"""Run commands in a helper process that has no file of an export open.

A forked child has its parent's files, and closes them at its exec. Closing a written NFS file waits for the server.
So a child of a process that writes to a dead server hangs before its command starts. With vfork, which lasts until the
exec, the parent and all its threads hang, too. The worker starts the helper before it opens the first export. The
helper answers each command on a socket.
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
#: Seconds that a killed process has to end.
_KILL_WAIT_S = 1.0
#: Additional seconds after the deadline for the helper's answer.
_MARGIN_S = 10.0
_MAX_MESSAGE = 64 * 1024
#: Seconds between two calls of *check*.
_TICK_S = 0.25
#: Seconds before the first call of *check*. The clean-up after a cancel uses the same store.
GRACE_S = 1.5


@dataclass(frozen=True)
class CommandResult:
    """The result of a command."""

    #: The exit status. None: the command missed its deadline. The helper killed it, or left it if it cannot be killed.
    code: int | None
    out: str = ""
    err: str = ""


class CommandHelper:
    """The caller's side of the helper process. Thread-safe."""

    def __init__(self) -> None:
        self._control, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with remote:
            # A new session: a signal from the terminal that ends the worker must not interrupt an unmount.
            subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(remote.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # else the reader of a pipe would wait for this process
                pass_fds=(remote.fileno(),),
                start_new_session=True,
            )

    def run(
        self,
        command: Sequence[str],
        deadline_s: float,
        held: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> CommandResult:
        """Run a command. The file *held* stays open until the command ends.

        Raises OSError if the helper has ended, and all errors of *check*. After an error of *check* the command
        continues until its deadline.
        """
        local, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with local:
            with remote:
                files = [remote.fileno(), *([held] if held is not None else [])]
                order = json.dumps({"command": list(command), "deadline_s": deadline_s}).encode()
                socket.send_fds(self._control, [order], files)
            if not (answer := _answer(local, deadline_s + _KILL_WAIT_S + _MARGIN_S, check)):
                raise ConnectionResetError("The helper that runs commands has ended")
            return CommandResult(**json.loads(answer))


def _answer(local: socket.socket, limit_s: float, check: Callable[[], None] | None) -> bytes:
    """Return the helper's answer. It is empty if the helper has ended. Raises TimeoutError."""
    began = time.monotonic()
    while True:
        local.settimeout(min(_TICK_S, limit_s) if check else limit_s)
        try:
            return local.recv(_MAX_MESSAGE)
        except TimeoutError:
            waited = time.monotonic() - began
            if check is None or waited > limit_s:
                raise
            if waited > GRACE_S:
                check()


_lock = threading.Lock()
_helper: tuple[int, CommandHelper] | None = None


def start() -> CommandHelper:
    """Return the helper of this process, and start it if necessary.

    Call this function before the process opens the first file of an export.
    """
    global _helper
    # Without vfork, another child of this process, for example qemu-img, blocks only its own thread.
    subprocess._USE_VFORK = False  # type: ignore[misc]  # the documentation allows users to set it
    with _lock:
        if _helper is None or _helper[0] != os.getpid():
            _helper = (os.getpid(), CommandHelper())
        return _helper[1]


def run(
    command: Sequence[str], deadline_s: float, held: int | None = None, check: Callable[[], None] | None = None
) -> CommandResult:
    """Run a command, see CommandHelper.run. If the helper was killed, for example out of memory, restart it once."""
    global _helper
    try:
        return start().run(command, deadline_s, held, check)
    except TimeoutError:
        return CommandResult(None)
    except OSError:
        with _lock:
            _helper = None
        return start().run(command, deadline_s, held, check)


# The code of the helper process. It uses only the standard library.


def _serve(control: socket.socket) -> None:
    while True:
        order, files, *_ = socket.recv_fds(control, _MAX_MESSAGE, 2)
        if not order:
            return  # the worker has ended; threads still wait for running commands
        threading.Thread(target=_handle, args=(json.loads(order), files)).start()


def _handle(order: dict[str, Any], files: list[int]) -> None:
    with socket.socket(fileno=files[0]) as answers:
        try:
            result = _run(order["command"], order["deadline_s"], files[1:])
        except OSError as error:
            result = {"code": 127, "err": str(error)}
        for each in files[1:]:
            os.close(each)
        with contextlib.suppress(OSError):
            answers.send(json.dumps(result).encode())


def _run(command: list[str], deadline_s: float, held: list[int]) -> dict[str, Any]:
    # The worker matches the output, so it must not be in the administrator's language. The command has a session, which
    # is killed as a whole: a mount.nfs that is not killed continues, and mounts later.
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
            child.wait(_KILL_WAIT_S)  # with a limit: a process in an uninterruptible call may never end
        return {"code": None}
    tails = (each.decode(errors="replace")[-4096:] for each in (out, err))
    return {"code": child.returncode, **dict(zip(("out", "err"), tails, strict=True))}


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
