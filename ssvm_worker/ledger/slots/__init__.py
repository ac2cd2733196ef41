"""How many may do a thing at once: slots by name, in this process; the ledger has the same for all workers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

#: Waits some seconds, or raises Cancelled.
Wait = Callable[[float], None]
#: Seconds between two tries at a slot.
_AGAIN_S = 0.25


class Slots(Protocol):
    """Gives slots."""

    def hold(self, name: str, limit: int, wait: Wait) -> AbstractContextManager[None]:
        """Within, one of *limit* slots of that name is ours; entering waits for it, and raises what *wait* raises."""


class LocalSlots:
    """Slots shared by the threads of this process."""

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
