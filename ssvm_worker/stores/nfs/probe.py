"""Probe a mount in a child process. The child may hang instead of this process, and is then killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import command_process

OK, HUNG, STALE, FAILED = "ok", "hung", "stale", "failed"
_STALE = ("Stale file handle", "Transport endpoint is not connected")
#: The server answers. Callers that lack a right get their own error.
_ANSWERED = ("Permission denied", "Operation not permitted")
#: Arguments of stat(1): block size, blocks, free blocks, and free blocks for users other than root. No cache answers
#: statfs. stat(1) starts fast also on a busy machine. A Python interpreter would need seconds of the deadline.
_STAT_ARGUMENTS = ("-f", "-c", "%S %b %f %a")


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe."""

    #: ok | hung | stale | failed
    state: str
    #: The reason of a failure.
    detail: str = ""
    #: Seconds until the answer.
    latency_s: float = 0.0
    #: Bytes: total, used, and free for an unprivileged user.
    usage: tuple[int, int, int] | None = None


def probe(
    point: str, deadline_s: float, command: Sequence[str] = (), check: Callable[[], None] | None = None
) -> ProbeResult:
    """Probe the mount at a mountpoint.

    The function returns shortly after the deadline at the latest. It leaves a child that cannot be killed.
    """
    started = time.monotonic()
    result = command_process.run(
        command or [shutil.which("stat") or "/usr/bin/stat", *_STAT_ARGUMENTS, point], deadline_s, check=check
    )
    latency_s = time.monotonic() - started
    if result.code is None:
        return ProbeResult(HUNG, f"no answer within {deadline_s:g} s")
    if result.code:
        reason = result.err.strip().rpartition(": ")[2]
        state = STALE if reason in _STALE else OK if reason in _ANSWERED else FAILED
        return ProbeResult(state, reason or "the probe failed")
    try:
        unit, blocks, free, available = map(int, result.out.split())
    except ValueError:
        return ProbeResult(FAILED, "the output of the probe is invalid")
    return ProbeResult(OK, latency_s=latency_s, usage=(blocks * unit, (blocks - free) * unit, available * unit))
