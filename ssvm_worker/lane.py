"""A thread that hands chunks to one consumer, in order, through a bounded queue.

The failure protocol: the consumer's first error is kept, the lane goes on emptying its queue so that nobody who puts
is ever blocked by a dead consumer, and the error is raised at the next ``put`` or at ``finish``.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from .errors import StoreUnavailable

#: Chunks that wait in one lane. A chunk is 1 MiB at the most, so a lane holds 6 MiB at the most; 4 to 8 are as fast.
DEPTH = 6
#: Seconds between two looks at the stop flag while a lane is full.
_POLL_S = 0.5


class Lane:
    """Runs *consume* on every chunk in a thread of its own."""

    def __init__(self, name: str, consume: Callable[[bytes], None], stall_s: float = 300.0) -> None:
        self.name = name
        self.error: BaseException | None = None
        self._consume = consume
        self._stall_s = stall_s
        self._queue: queue.Queue[bytes | None] = queue.Queue(DEPTH)
        self._dropped = False
        self._thread = threading.Thread(target=self._run, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def put(self, chunk: bytes, check: Callable[[], None]) -> None:
        """Queue a chunk; waits while the lane is full, calling *check* twice a second.

        Raises: the consumer's error; what *check* raises; StoreUnavailable when the consumer took nothing for stall_s.
        """
        self._offer(chunk, check)
        if self.error is not None:
            raise self.error

    def finish(self, check: Callable[[], None]) -> None:
        """Wait until every chunk is consumed; raises the consumer's error."""
        self._offer(None, check)
        deadline = time.monotonic() + self._stall_s
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
            check()
            self._refuse_stall(deadline)
        if self.error is not None:
            raise self.error

    def drop(self, patience_s: float = 30.0) -> bool:
        """Throw away what is queued and stop; False if the consumer is stuck and its thread had to be left behind."""
        self._dropped = True
        while self._thread.is_alive():
            try:
                self._queue.put_nowait(None)
                break
            except queue.Full:
                self._take()
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    def _take(self) -> None:
        with contextlib.suppress(queue.Empty):
            self._queue.get_nowait()

    def _offer(self, chunk: bytes | None, check: Callable[[], None]) -> None:
        deadline = time.monotonic() + self._stall_s
        while True:
            try:
                self._queue.put(chunk, timeout=_POLL_S)
                return
            except queue.Full:
                check()
                self._refuse_stall(deadline)

    def _refuse_stall(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                f"Nothing was taken for {self._stall_s:.0f} s", self.name, "Look at this store first"
            )

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            if self.error is None and not self._dropped:
                try:
                    self._consume(chunk)
                except BaseException as error:  # noqa: BLE001 - handed over to the thread that puts
                    self.error = error
