"""A thread that hands chunks to one consumer, in order, through a bounded queue.

The failure protocol: the consumer's first error is kept, the lane goes on emptying its queue so that nobody who puts
is ever blocked by a dead consumer, and the error is raised at the next ``put`` or at ``finish``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from .errors import StoreUnavailable

#: Chunks that wait in one lane. A chunk is 1 MiB at the most, so a lane holds 5 MiB at the most; 4 to 8 are as fast.
DEPTH = 5
#: Seconds between two looks at the stop flag while a lane is full.
_POLL_S = 0.5


class Lane:
    """Runs *consume* on every chunk in a thread of its own.

    Two SimpleQueues, one of chunks and one of places for them: both wait in C, and nothing has to be taken out of a
    full queue to stop it. What that gains by itself was not measured.
    """

    def __init__(self, name: str, consume: Callable[[bytes], None], stall_s: float = 300.0) -> None:
        self.name = name
        self.error: BaseException | None = None
        self._consume = consume
        self._stall_s = stall_s
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(DEPTH):
            self._room.put(None)
        self._taken = 0
        self._dropped = False
        self._thread = threading.Thread(target=self._run, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def put(self, chunk: bytes, check: Callable[[], None]) -> None:
        """Queue a chunk; waits while the lane is full, calling *check* twice a second.

        Raises: the consumer's error; what *check* raises; StoreUnavailable when the consumer took nothing for stall_s.
        """
        self._wait(self._has_room, check)
        self._chunks.put(chunk)
        if self.error is not None:
            raise self.error

    def finish(self, check: Callable[[], None]) -> None:
        """Wait until every chunk is consumed; raises the consumer's error, and what ``put`` raises."""
        self._chunks.put(None)
        self._wait(self._has_ended, check)
        if self.error is not None:
            raise self.error

    def drop(self, patience_s: float = 30.0, *, take: bool = False) -> bool:
        """Stop, and throw away what is queued, unless the consumer shall *take* it and does so while patience lasts.

        False if the consumer is stuck and its thread had to be left behind.
        """
        self._dropped = not take
        self._chunks.put(None)
        self._thread.join(patience_s)
        self._dropped = True
        return not self._thread.is_alive()

    def _has_room(self) -> bool:
        try:
            self._room.get(timeout=_POLL_S)
        except queue.Empty:
            return False
        return True

    def _has_ended(self) -> bool:
        self._thread.join(_POLL_S)
        return not self._thread.is_alive()

    def _wait(self, until: Callable[[], bool], check: Callable[[], None]) -> None:
        """Repeat *until*, which waits itself, as long as chunks are taken."""
        taken, deadline = self._taken, time.monotonic() + self._stall_s
        while not until():
            check()
            if self._taken != taken:
                taken, deadline = self._taken, time.monotonic() + self._stall_s
            elif time.monotonic() > deadline:
                what = f"Nothing was taken for {self._stall_s:.0f} s"
                raise StoreUnavailable(what, self.name, "Look at this store first")

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._taken += 1
            self._room.put(None)
            if self.error is None and not self._dropped:
                try:
                    self._consume(chunk)
                except BaseException as error:  # noqa: BLE001 - handed over to the thread that puts
                    self.error = error
