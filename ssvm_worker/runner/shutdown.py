"""What a pool process does with its worker's SIGTERM: the running job gets time to end, then it hands over."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Seconds in which a job that was told to stop should be gone; then whatever call it is stuck in is interrupted.
_GENTLE_S = 5.0


@contextmanager
def draining(stop: Callable[[], None], drain_s: float) -> Iterator[None]:
    """While a job runs, a termination signal lets it go on for *drain_s*, then calls *stop*, then raises SystemExit.

    Each further signal brings the next step at once. Celery's own handler would raise SystemExit in the middle of
    whatever line is running, and its soft shutdown sleeps the full time though the job may end at once.
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

    kept = {each: signal.signal(each, on_signal) for each in (_term_signal(), signal.SIGALRM)}
    try:
        yield
    finally:
        if steps:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in kept.items():
            signal.signal(each, handler)


def _term_signal() -> signal.Signals:
    """What a worker sends to its pool processes at its end: see REMAP_SIGTERM in Celery's manual."""
    return signal.Signals[os.environ.get("REMAP_SIGTERM") or "SIGTERM"]
