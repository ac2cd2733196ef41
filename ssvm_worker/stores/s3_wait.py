"""Waits for an S3 server that may be silent: another thread makes the blocking call, the caller watches the time.

The SDK cannot interrupt a call. A call that is given up ends later in its own thread, by the SDK's time-outs, and what
it returns is dropped.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ssvm_worker.errors import Cancelled
from ssvm_worker.sockets import TICK, Stalled, Watch

_T = TypeVar("_T")
#: After a call was given up, calls to the same server get that many seconds for so long: those that clean up must not
#: wait for a server that is known to be silent.
_SHORT_S, _SILENT_S = 0.5, 3.0
#: When calls to a server were given up last.
_SILENT: dict[str, float] = {}


class Aside:
    """A daemon thread that makes the calls of one caller, one at a time; of no more use when one was given up."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="s3-call", daemon=True).start()

    def call(self, call: Callable[[], _T], watch: Watch, moved: Callable[[], int] = lambda: 0) -> _T:
        """Return what *call* returns, or raise what it raises; *moved* counts bytes, which only grow.

        Raises Stalled if no byte moves, and within two ticks what the watch's check raises.
        """
        self._calls.put(call)
        seen = moved()
        while True:
            try:
                answer, error = self._answers.get(timeout=TICK)
            except queue.Empty:
                now = moved()
                watch.spent(TICK, max(0, now - seen))
                seen = now
                continue
            if error is not None:
                raise error
            return answer  # type: ignore[no-any-return]

    def end(self, last: Callable[[], Any] = lambda: None) -> None:
        """End the thread after the call that it makes, and after the call of *last*."""
        self._calls.put(last)
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._answers.put((call(), None))
            except BaseException as error:  # noqa: BLE001 - raised again by who waits
                self._answers.put((None, error))


def call_aside(server: str, call: Callable[[], _T], watch: Watch, moved: Callable[[], int] = lambda: 0) -> _T:
    """Make one *call* to *server* in a thread of its own; raises what ``Aside.call`` raises."""
    silent = time.monotonic() - _SILENT.get(server, -_SILENT_S) < _SILENT_S
    if silent:
        watch = Watch(watch.check, min(_SHORT_S, watch.stall_s), watch.min_rate)
    aside, before = Aside(), moved()
    try:
        answer = aside.call(call, watch, moved)
    except BaseException as error:
        if not silent and isinstance(error, (Stalled, Cancelled)) and moved() == before:
            _SILENT[server] = time.monotonic()
        raise
    finally:
        aside.end()
    _SILENT.pop(server, None)
    return answer
