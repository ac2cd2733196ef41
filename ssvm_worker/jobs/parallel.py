"""Run callables in threads and wait for all of them, even if one fails."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from ssvm_worker.errors import Cancelled, WorkerError

#: The longest wait for a thread, in seconds. Python handles signals between two waits.
_POLL_S = 0.5


def in_parallel(max_threads: int, tasks: Sequence[Callable[[], None]]) -> None:
    """Run every task in one of *max_threads* threads, and return when all threads have ended.

    An error of one task does not stop the running tasks. After a cancel, a permanent error or a bug no further task
    starts. Raises the gravest error, in this order: a cancel, a bug, a permanent error, any other error.
    """
    pending, errors = deque(tasks), list[BaseException]()

    def work() -> None:
        while True:
            try:
                task = pending.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
                errors.append(error)
                if _gravity(error):
                    pending.clear()

    count = min(max_threads, len(tasks))
    threads = [threading.Thread(target=work, name=f"disk-{number}", daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(_POLL_S)
    if errors:
        raise max(errors, key=_gravity)


def _gravity(error: BaseException) -> int:
    if isinstance(error, Cancelled):
        return 3
    if not isinstance(error, WorkerError):
        return 2
    return int(not error.retryable)
