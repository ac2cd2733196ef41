"""Semaphores by name: how many jobs may do one thing at once. This module has the one for a single process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

#: Waits some seconds, or raises Cancelled.
Wait = Callable[[float], None]
#: Seconds between two tries.
_AGAIN_S = 0.25


class Slots(Protocol):
    """Semaphores by name."""

    def hold(self, name: str, limit: int, wait: Wait) -> AbstractContextManager[None]:
        """Hold one of *limit* slots while the block runs.

        While all slots are held, this method calls *wait*. It passes on the errors of *wait*.
        """


class LocalSlots:
    """Semaphores that the threads of this process share."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, name: str, limit: int, wait: Wait) -> Iterator[None]:
        while not self._take(name, limit):
            wait(_AGAIN_S)
        try:
            yield
        finally:
            with self._lock:
                self._held[name] -= 1

    def _take(self, name: str, limit: int) -> bool:
        with self._lock:
            if self._held[name] >= limit:
                return False
            self._held[name] += 1
            return True
