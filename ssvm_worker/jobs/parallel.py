"""Several things at once, each to its end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from ssvm_worker.errors import Cancelled, WorkerError

#: Seconds between two looks whether a thread has ended; signals are heard in between.
_POLL_S = 0.5


def in_parallel(most: int, tasks: Sequence[Callable[[], None]]) -> None:
    """Run every task, *most* at once, in threads; what one raises does not stop those that run.

    After an error that another attempt would meet again, and after a cancel, no further task is begun.
    Raises the gravest error: a cancel, a bug of ours, a permanent one, any other; when all threads have ended.
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
            except BaseException as error:  # noqa: BLE001 - handed over to the caller
                errors.append(error)
                if _gravity(error):
                    pending.clear()

    threads = [
        threading.Thread(target=work, name=f"disk-{number}", daemon=True) for number in range(min(most, len(tasks)))
    ]
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
