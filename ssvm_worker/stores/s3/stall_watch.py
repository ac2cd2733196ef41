"""Waits for an S3 server that may be silent: another thread makes the blocking call, the caller watches the time.

The SDK cannot interrupt a call. A call that is given up ends later in its own thread, by the SDK's time-outs, and what
it returns is dropped.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ssvm_worker.errors import Cancelled
from ssvm_worker.net.sockets import TICK, Stalled, StallWatch

_T = TypeVar("_T")
#: After a call was given up, calls to the same server get that many seconds for so long: those that clean up must not
#: wait for a server that is known to be silent.
_SHORT_S, _SILENT_S = 0.5, 3.0
#: When the job of this process last gave up a call to a server.
_SILENT: dict[str, float] = {}


def forget_silence() -> None:
    """Let calls wait for as long as usual: the next job knows of no silent server."""
    _SILENT.clear()


def call_aside(server: str, call: Callable[[], _T], watch: StallWatch, moved: Callable[[], int] = lambda: 0) -> _T:
    """Return what *call* to *server* returns, or raise what it raises; *moved* counts bytes, which only grow.

    Raises Stalled if no byte moves, and within two ticks what the watch's check raises.
    """
    silent = time.monotonic() - _SILENT.get(server, -_SILENT_S) < _SILENT_S
    if silent:
        watch = StallWatch(watch.check, min(_SHORT_S, watch.stall_s), watch.min_rate)
    before = moved()
    try:
        answer = _answer(call, watch, moved)
    except (Stalled, Cancelled):
        if not silent and moved() == before:
            _SILENT[server] = time.monotonic()
        raise
    _SILENT.pop(server, None)
    return answer


def _answer(call: Callable[[], _T], watch: StallWatch, moved: Callable[[], int]) -> _T:
    answers: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # noqa: BLE001 - the caller raises it again
            answers.put((None, error))

    threading.Thread(target=run, name="s3-call", daemon=True).start()
    seen = moved()
    while True:
        try:
            answer, error = answers.get(timeout=TICK)
        except queue.Empty:
            now = moved()
            watch.spent(TICK, max(0, now - seen))
            seen = now
            continue
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]  # without an error it is what the call returned
