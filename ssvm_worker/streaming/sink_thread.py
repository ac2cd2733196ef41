"""A thread that hands chunks to one consumer, in order, through a bounded queue.

The failure protocol: the consumer's first error is kept, the lane goes on emptying its queue so that nobody who puts
is ever blocked by a dead consumer, and the error is raised at the next ``put`` or at ``finish``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from ssvm_worker.errors import ResourceBusy, StoreUnavailable
from ssvm_worker.units import human_size

#: Chunks that wait in one lane. A chunk is 1 MiB at the most, so a lane holds 5 MiB at the most; 4 to 8 are as fast.
DEPTH = 5
#: Seconds between two looks at the stop flag while a lane is full.
_POLL_S = 0.5


class SlowSinkDetector:
    """Judges a consumer that works, but so slowly that it holds up all others.

    It is too slow if the stream has waited for it during more than half of a window, and it took less than *rate* bytes
    a second in it. A slow source is not its fault: then nobody waits for the consumer. A *rate* of 0 allows all.
    """

    def __init__(self, rate: int, window_s: float = 30.0) -> None:
        self.rate = rate
        self._window_s = window_s
        self._since = time.monotonic()
        self._waited_s = 0.0
        self._taken = 0

    def is_shown(self, now: float, waited_s: float, taken: int) -> bool:
        """Whether a window that ends *now* shows it; *waited_s* and *taken* (bytes) are totals since the beginning."""
        elapsed = now - self._since
        if not self.rate or elapsed < self._window_s:
            return False
        waited, took = waited_s - self._waited_s, taken - self._taken
        self._since, self._waited_s, self._taken = now, waited_s, taken
        return waited > elapsed / 2 and took < self.rate * elapsed

    def error(self, where: str) -> StoreUnavailable:
        """What is raised then."""
        what = f"The store takes less than {human_size(self.rate)} a second, and all others wait for it"
        return StoreUnavailable(what, where, "A copy job follows. Look at this store, or lower worker.min_store_rate")


class SinkThread:
    """Runs *consume* on every chunk in a thread of its own.

    Two SimpleQueues, one of chunks and one of places for them: both wait in C, and nothing has to be taken out of a
    full queue to stop it. What that gains by itself was not measured.
    """

    def __init__(
        self,
        name: str,
        consume: Callable[[bytes], None],
        stall_s: float = 300.0,
        *,
        slowness: SlowSinkDetector | None = None,
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        """*settle* is called in the lane's thread behind the last chunk, if all are consumed."""
        self.name = name
        self.error: BaseException | None = None
        self._consume = consume
        self._stall_s = stall_s
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(DEPTH):
            self._room.put(None)
        self._slowness = slowness or SlowSinkDetector(0)
        self._settle = settle
        self._waited_s = 0.0
        self._taken = self._bytes = 0
        self._dropped = self._finishing = False
        self._thread = threading.Thread(target=self._run, name=f"lane-{name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            what = f"No thread can be started: {error}"
            raise ResourceBusy(what, name, "Lower worker.concurrency, or raise the limit of tasks") from error

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
        self._finishing = True
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
        began = time.monotonic()
        taken, deadline = self._taken, began + self._stall_s
        while not until():
            check()
            self._refuse_slow(time.monotonic() - began)
            if self._taken != taken:
                taken, deadline = self._taken, time.monotonic() + self._stall_s
            elif time.monotonic() > deadline:
                what = f"Nothing was taken for {self._stall_s:.0f} s"
                raise StoreUnavailable(what, self.name, "Look at this store first")
        self._waited_s += time.monotonic() - began
        self._refuse_slow()

    def _refuse_slow(self, waiting_s: float = 0.0) -> None:
        if self._slowness.is_shown(time.monotonic(), self._waited_s + waiting_s, self._bytes):
            raise self._slowness.error(self.name)

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._taken += 1
            self._room.put(None)
            if self.error is None and not self._dropped:
                try:
                    self._consume(chunk)
                    self._bytes += len(chunk)
                except BaseException as error:  # noqa: BLE001 - handed over to the thread that puts
                    self.error = error
        if self._finishing and self.error is None and not self._dropped:
            try:
                self._settle()
            except BaseException as error:  # noqa: BLE001 - as above
                self.error = error
