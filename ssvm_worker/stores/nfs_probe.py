"""A look at a mount by a child process, which may hang in this one's place, and is killed when it does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .nfs_commands import abandon

OK, HUNG, STALE, FAILED = "ok", "hung", "stale", "failed"
_STALE = (errno.ESTALE, errno.ENOTCONN)
#: The server answers; what it refuses is told where it is wanted.
_ANSWERED = (errno.EACCES, errno.EPERM)
_LOOK = str(Path(__file__).with_name("nfs_look.py"))


@dataclass(frozen=True)
class Probed:
    """What a probe has found."""

    #: ok | hung | stale | failed
    state: str
    #: What is wrong.
    detail: str = ""
    #: Of the server's answer.
    latency_s: float = 0.0
    #: Bytes: total, used, and free for an unprivileged user.
    usage: tuple[int, int, int] | None = None


def probe(point: str, deadline_s: float, command: Sequence[str] = ()) -> Probed:
    """Look at what is mounted there. Never longer than the deadline and a moment: a child that cannot die is left."""
    child = subprocess.Popen(
        command or [sys.executable, "-I", "-S", _LOOK, point],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        said = child.communicate(timeout=deadline_s)[0]
    except subprocess.TimeoutExpired:
        abandon(child)
        return Probed(HUNG, f"no answer within {deadline_s:g} s")
    try:
        return _read(json.loads(said))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Probed(FAILED, f"the probe ended with {child.returncode}")


def _read(said: dict[str, object]) -> Probed:
    if code := said.get("errno"):
        state = STALE if code in _STALE else OK if code in _ANSWERED else FAILED
        return Probed(state, os.strerror(int(str(code))))
    total, used, free = (int(str(said[name])) for name in ("total", "used", "free"))
    return Probed(OK, latency_s=float(str(said["latency_s"])), usage=(total, used, free))
