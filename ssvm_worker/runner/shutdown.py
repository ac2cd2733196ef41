"""Handle a worker's SIGTERM in a pool process: the running job gets time to end, then it is queued again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Seconds that a job has to stop after a request to stop. Then the call in which it hangs is interrupted.
_GENTLE_S = 5.0


@contextmanager
def draining(stop: Callable[[], None], drain_s: float) -> Iterator[None]:
    """Handle termination signals while a job runs in the block.

    The first signal lets the job run for *drain_s* seconds more. Then *stop* is called, and later SystemExit is
    raised. Each further signal starts the next step at once.

    Celery's own handler raises SystemExit at any line. Its soft shutdown always sleeps the full time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    steps = 0

    def on_signal(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            signal.setitimer(signal.ITIMER_REAL, drain_s)
        elif steps == 2:
            stop()
            signal.setitimer(signal.ITIMER_REAL, _GENTLE_S)
        else:
            raise SystemExit("the job did not stop in time")

    # The signal that a worker sends to its pool processes when it ends: see REMAP_SIGTERM in Celery's manual.
    term_signal = signal.Signals[os.environ.get("REMAP_SIGTERM") or "SIGTERM"]
    previous = {each: signal.signal(each, on_signal) for each in (term_signal, signal.SIGALRM)}
    try:
        yield
    finally:
        if steps:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in previous.items():
            signal.signal(each, handler)
