"""Call an S3 server that may not answer. Another thread makes the blocking call, and the caller watches the time.

The SDK cannot interrupt a call. After a timeout the call ends later in its thread, by the SDK's own timeouts. Its
result is dropped.
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
#: The short time limit of calls to a silent server, in seconds. Clean-up must not wait long for a silent server.
_SHORT_S = 0.5
#: Seconds after a timeout for which a server counts as silent.
_SILENT_S = 3.0
#: The time of the last timeout of each server in this process's job.
_SILENT: dict[str, float] = {}


def forget_silence() -> None:
    """Forget the silent servers before the next job."""
    _SILENT.clear()


def call_aside(server: str, call: Callable[[], _T], watch: StallWatch, moved: Callable[[], int] = lambda: 0) -> _T:
    """Run *call* in another thread. Return its result, or raise its error. *moved* returns the transferred bytes.

    Raises Stalled if no byte moves. Raises the error of the watch's check within two ticks.
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
        return answer  # type: ignore[return-value]  # without an error this is the call's result
