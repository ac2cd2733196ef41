"""A sink before another, which never waits for it long: what a store is far too slow for goes to a scratch file.

Chunks wait in memory, eight at the most, then in a file of a fixed size that has no name, so that no crash leaves it
behind; they are written to the store in their order by a thread of the sink's own.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.units import human_size

from .fan_out import SlowSinkDetector
from .interfaces import Check, LeavingAborts, Sink, StoredObject

#: Chunks in memory before the file is used; a chunk is 1 MiB at the most.
DEPTH = 8
#: Seconds that a chunk waits for room in memory before the file is used. A store that takes 5 MiB a second holds the
#: stream back, which costs less than to write and read every byte once more; a slower one does not.
HOLD_S = 0.2
#: Seconds for which a store may take nothing.
STALL_S = 300.0
#: Seconds between two looks at *check* while somebody waits.
_POLL_S = 0.25
#: Seconds that the store gets to end a write when all is given up, and that its clean-up gets when it does not.
_PROMPTLY_S = 1.0
_PATIENCE_S = 10.0

_log = logging.getLogger("ssvm.spill")


class RingFile:
    """A file of at most *size* bytes without a name, written and read in turn, around and around.

    One thread puts and another takes; the room is given back when nobody holds it any more, so that neither can meet
    a descriptor that was closed under it and is another file's by now. OSError where the directory does not let us, or
    the disk is full.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.size = size
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            self._fd = os.dup(file.fileno())
        self._in = self._out = 0

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def put(self, chunk: bytes) -> None:
        """Append a chunk; there is room for it, as the caller knows."""
        self._in = self._around(self._in, len(chunk), lambda at, a, b: self._write(chunk[a:b], at))

    def take(self, size: int) -> bytes:
        """The next bytes, which were put as one chunk."""
        pieces: list[bytes] = []
        self._out = self._around(self._out, size, lambda at, a, b: pieces.append(os.pread(self._fd, b - a, at)))
        return b"".join(pieces)

    def _around(self, at: int, size: int, step: Callable[[int, int, int], None]) -> int:
        first = min(size, self.size - at)
        step(at, 0, first)
        if first < size:
            step(0, first, size)
        return (at + size) % self.size

    def _write(self, data: bytes, at: int) -> None:
        while data:
            done = os.pwrite(self._fd, data, at)
            data, at = data[done:], at + done


class DiskBuffer(LeavingAborts):
    """A ``Sink`` around *inner*, which the caller has entered, and leaves after this.

    *limit*: bytes of the scratch file in *directory*. When that is full too, a *patient* sink makes the stream wait,
    any other fails with StoreUnavailable. *check* is heard while anybody waits; a store that takes nothing for
    ``STALL_S`` fails, and one that shows *slowness*. Bytes: DEPTH chunks and the one that is being written.
    """

    def __init__(
        self,
        inner: Sink,
        directory: Path,
        limit: int,
        *,
        patient: bool,
        check: Check = lambda: None,
        slowness: SlowSinkDetector | None = None,
    ) -> None:
        self.key = inner.key
        self.offset = inner.offset
        #: Bytes that went through the file.
        self.spilled = 0
        self._inner = inner
        self._directory = directory
        self._limit = limit
        self._patient = patient
        self._check = check
        self._slowness = slowness or SlowSinkDetector(0)
        self._waited_s = 0.0
        self._written = 0
        self._ring: RingFile | None = None
        #: What waits, in its order: chunks, and the lengths of those that are in the file.
        self._queue: deque[bytes | int] = deque()
        self._in_memory = self._in_file = self._taken = 0
        self._busy = self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="spill", daemon=True)
        self._thread.start()

    def write(self, chunk: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._in_memory < DEPTH or self._error or self._stopped, HOLD_S)
            self._wait(lambda: self._in_memory < DEPTH or self._has_room(chunk) or not self._patient)
            if self._in_memory < DEPTH:
                self._in_memory += 1
                self._add(chunk)
                return
            if not self._has_room(chunk):
                raise self._too_slow()
            self._in_file += len(chunk)
        self._write_file(chunk)

    def resumed(self) -> Iterator[bytes]:
        return self._inner.resumed()

    def settle(self) -> int:
        return self._inner.settle()

    def commit(self) -> StoredObject:
        with self._changed:
            self._wait(lambda: not self._queue and not self._busy)
        self._stop()
        return self._inner.commit()

    def abort(self) -> None:
        self._give_up(self._inner.abort)

    def suspend(self) -> None:
        self._give_up(self._inner.suspend)

    # The side of the stream.

    def _has_room(self, chunk: bytes) -> bool:
        return self._limit - self._in_file >= len(chunk)

    def _add(self, item: bytes | int) -> None:
        self._queue.append(item)
        self._changed.notify_all()

    def _write_file(self, chunk: bytes) -> None:
        try:
            ring = self._ring = self._ring or RingFile(self._directory, self._limit)
            ring.put(chunk)
        except OSError as error:
            _log.warning("%s cannot be used, so nothing more is spilled there: %s", self._directory, error)
            with self._changed:
                self._in_file -= len(chunk)
                self._limit = 0
            self.write(chunk)
            return
        self.spilled += len(chunk)
        with self._changed:
            self._add(len(chunk))

    def _wait(self, until: Callable[[], bool]) -> None:
        """Until that is so; raises what ended it before. The condition is held."""
        began = time.monotonic()
        seen, deadline = self._taken, began + STALL_S
        while self._error is None and not self._stopped and not until():
            self._changed.wait(_POLL_S)
            self._check()
            now = time.monotonic()
            if self._slowness.is_shown(now, self._waited_s + now - began, self._written):
                raise self._slowness.error(self.key)
            if self._taken != seen:
                seen, deadline = self._taken, time.monotonic() + STALL_S
            elif time.monotonic() > deadline:
                raise self._too_slow()
        self._waited_s += time.monotonic() - began
        if self._error is not None:
            raise self._error

    def _too_slow(self) -> StoreUnavailable:
        what = f"The store is too slow, and {human_size(self.spilled)} went through the scratch file"
        return StoreUnavailable(what, self.key, "Look at this store first, or raise backup.spill_bytes")

    # The side of the store.

    def _run(self) -> None:
        while (item := self._next()) is not None:
            try:
                self._inner.write(item if isinstance(item, bytes) else self._from_file(item))
            except BaseException as error:  # noqa: BLE001 - handed over to the thread that writes
                self._error = error
            with self._changed:
                self._taken += 1
                self._written += item if isinstance(item, int) else len(item)
                self._in_file -= item if isinstance(item, int) else 0
                self._busy = False
                self._changed.notify_all()
            if self._error is not None:
                return

    def _next(self) -> bytes | int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopped)
            if self._stopped:
                return None
            item = self._queue.popleft()
            self._busy = True
            self._in_memory -= isinstance(item, bytes)
            self._changed.notify_all()
            return item

    def _from_file(self, size: int) -> bytes:
        if (ring := self._ring) is None:
            raise StoreUnavailable("It was given up", self.key)
        return ring.take(size)

    # The end.

    def _stop(self, patience_s: float | None = None) -> bool:
        """Whether the store's thread has ended."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(patience_s)
        self._ring = None
        return not self._thread.is_alive()

    def _give_up(self, step: Callable[[], None]) -> None:
        """Abort or suspend, once; also if the store is stuck in a write, which that may free."""
        again = self._stopped
        if self._stop(0 if again else _PROMPTLY_S):
            step()
        elif not again:
            beside = threading.Thread(target=step, name="clean-up", daemon=True)
            beside.start()
            beside.join(_PATIENCE_S)
            self._stop(0)
