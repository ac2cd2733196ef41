"""A look at a mount by a process that may hang in this one's place, and is killed when it does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import command_process

OK, HUNG, STALE, FAILED = "ok", "hung", "stale", "failed"
_STALE = ("Stale file handle", "Transport endpoint is not connected")
#: The server answers; what it refuses is told where it is wanted.
_ANSWERED = ("Permission denied", "Operation not permitted")
#: Block size, blocks, free, free for others than root. statfs is never answered from a cache, and this program starts
#: in a moment on a busy machine too, where an interpreter takes seconds of the deadline.
_LOOK = ("-f", "-c", "%S %b %f %a")


@dataclass(frozen=True)
class ProbeResult:
    """What a probe has found."""

    #: ok | hung | stale | failed
    state: str
    #: What is wrong.
    detail: str = ""
    #: Until the answer.
    latency_s: float = 0.0
    #: Bytes: total, used, and free for an unprivileged user.
    usage: tuple[int, int, int] | None = None


def probe(
    point: str, deadline_s: float, command: Sequence[str] = (), check: Callable[[], None] | None = None
) -> ProbeResult:
    """Look at what is mounted there. Never longer than the deadline and a moment: a child that cannot die is left."""
    started = time.monotonic()
    ran = command_process.run(
        command or [shutil.which("stat") or "/usr/bin/stat", *_LOOK, point], deadline_s, check=check
    )
    if ran.code is None:
        return ProbeResult(HUNG, f"no answer within {deadline_s:g} s")
    if ran.code:
        return _failed(ran.err.strip().rpartition(": ")[2])
    return _read(ran.out, time.monotonic() - started)


def _failed(wrong: str) -> ProbeResult:
    state = STALE if wrong in _STALE else OK if wrong in _ANSWERED else FAILED
    return ProbeResult(state, wrong or "the probe failed")


def _read(said: str, latency_s: float) -> ProbeResult:
    try:
        unit, blocks, free, left = map(int, said.split())
    except ValueError:
        return ProbeResult(FAILED, "the probe said something else")
    return ProbeResult(OK, latency_s=latency_s, usage=(blocks * unit, (blocks - free) * unit, left * unit))
