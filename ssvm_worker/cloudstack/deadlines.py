"""Call stores with a time limit. A call to a mount that hangs cannot be interrupted, so its thread is left behind."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from ssvm_worker.errors import StoreAway

T = TypeVar("T")
#: The maximum of calls of one store that may hang. Each holds a thread.
_MAX_HUNG = 8


class StoreCalls:
    """Runs calls of stores in threads. Thread-safe."""

    def __init__(self) -> None:
        self._hung: Counter[str] = Counter()
        self._lock = threading.Lock()

    def run(self, store: str, call: Callable[[], T], limit_s: float) -> T:
        """Return the result of a call, or raise its error. Raise StoreAway after *limit_s* seconds.

        Raise StoreAway at once if too many earlier calls of the store still hang.
        """
        if self._hung[store] >= _MAX_HUNG:
            what = f"The store does not answer: {_MAX_HUNG} earlier calls still wait for it"
            raise StoreAway(what, store, "Check the server and the network")
        results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        lock, state = threading.Lock(), {"hung": False, "ended": False}

        def work() -> None:
            try:
                results.put((call(), None))
            except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
                results.put((None, error))
            with lock:
                state["ended"] = True
                if state["hung"]:
                    self._count(store, -1)

        threading.Thread(target=work, name=f"store {store}", daemon=True).start()
        try:
            result, error = results.get(timeout=limit_s)
        except queue.Empty:
            with lock:
                if not state["ended"]:
                    state["hung"] = True
                    self._count(store, 1)
            what = f"The store did not answer within {limit_s:g} s"
            raise StoreAway(what, store, "Check the server and the network") from None
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _count(self, store: str, by: int) -> None:
        with self._lock:
            self._hung[store] += by
