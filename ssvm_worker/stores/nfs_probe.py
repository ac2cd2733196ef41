"""A look at a mount by a child process, which may hang in this one's place, and is killed when it does."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .nfs_commands import abandon

OK, HUNG, STALE, FAILED = "ok", "hung", "stale", "failed"
_STALE = ("Stale file handle", "Transport endpoint is not connected")
#: The server answers; what it refuses is told where it is wanted.
_ANSWERED = ("Permission denied", "Operation not permitted")
#: Block size, blocks, free, free for others than root. statfs is never answered from a cache, and this program starts
#: in a moment on a busy machine too, where an interpreter takes seconds of the deadline.
_LOOK = ("-f", "-c", "%S %b %f %a")


@dataclass(frozen=True)
class Probed:
    """What a probe has found."""

    #: ok | hung | stale | failed
    state: str
    #: What is wrong.
    detail: str = ""
    #: Until the answer.
    latency_s: float = 0.0
    #: Bytes: total, used, and free for an unprivileged user.
    usage: tuple[int, int, int] | None = None


def probe(point: str, deadline_s: float, command: Sequence[str] = ()) -> Probed:
    """Look at what is mounted there. Never longer than the deadline and a moment: a child that cannot die is left."""
    started = time.monotonic()
    child = subprocess.Popen(
        command or [shutil.which("stat") or "/usr/bin/stat", *_LOOK, point],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={"PATH": os.defpath, "LC_ALL": "C"},
    )
    try:
        said, wrong = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        abandon(child)
        return Probed(HUNG, f"no answer within {deadline_s:g} s")
    if child.returncode:
        return _failed(wrong.decode(errors="replace").strip().rpartition(": ")[2])
    return _read(said, time.monotonic() - started)


def _failed(wrong: str) -> Probed:
    state = STALE if wrong in _STALE else OK if wrong in _ANSWERED else FAILED
    return Probed(state, wrong or "the probe failed")


def _read(said: bytes, latency_s: float) -> Probed:
    try:
        unit, blocks, free, left = map(int, said.split())
    except ValueError:
        return Probed(FAILED, "the probe said something else")
    return Probed(OK, latency_s=latency_s, usage=(blocks * unit, (blocks - free) * unit, left * unit))
