"""Call stores with a time limit, and postpone work until a burst of commands has ended.

A call to a mount that hangs cannot be interrupted, so its thread is left behind.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, TypeVar

from ssvm_worker.errors import StoreAway

T = TypeVar("T")
#: The maximum of calls of one store that may hang. Each holds a thread.
_MAX_HUNG = 8
#: A burst has ended if no work comes for so many seconds, or after so many seconds.
_PAUSE_S, _BURST_S = 0.02, 0.2
_log = logging.getLogger("ssvm.cloudstack")


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


class AfterBurst:
    """Does work in a thread after a burst of commands, so that no answer waits for it.

    A hundred commands may come at once, and Python runs one thread. Work that no server waits for is done after the
    answers.
    """

    def __init__(self, name: str) -> None:
        """Start the thread. It has that name."""
        self._work: deque[Callable[[], object]] = deque()
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, work: Callable[[], object]) -> None:
        """Let the thread do that work. It keeps the order. If this process ends before, the work is not done."""
        self._work.append(work)
        if not self._wanted.is_set():
            self._wanted.set()

    def wait(self, seconds: float) -> bool:
        """Wait until all work is done that was put so far. Return whether it is."""
        done = threading.Event()
        self.put(done.set)
        return done.wait(seconds)

    def _run(self) -> None:
        while self._wanted.wait():
            until, seen = time.monotonic() + _BURST_S, 0
            while len(self._work) != seen and time.monotonic() < until:
                seen = len(self._work)
                time.sleep(_PAUSE_S)
            self._wanted.clear()
            while self._work:
                try:
                    self._work.popleft()()
                except Exception:  # noqa: BLE001 - the thread must go on
                    _log.exception("work after a burst of commands has failed")
