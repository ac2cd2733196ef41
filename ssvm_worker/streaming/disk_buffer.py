"""Buffer a slow sink: chunks that the store cannot take in time wait in a scratch file.

Chunks wait in memory first, at most QUEUE_SIZE bytes, and then in a file of fixed size. The file has no name, so a
crash leaves nothing behind. A separate thread writes the chunks to the store in their order.
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

from .interfaces import Check, LeavingAborts, Sink, StoredObject
from .pipeline import QUEUE_SIZE, SlowSinkDetector, room_of

#: Seconds that a chunk waits for room in memory before the file is used. A store that takes 5 MiB a second frees room
#: in this time. Waiting for such a store costs less than writing every byte to the file and reading it back.
HOLD_S = 0.2
#: Seconds without progress after which the store counts as unavailable.
STALL_S = 300.0
#: Seconds between two calls of *check* while the stream waits.
_POLL_S = 0.25
#: Seconds that the running write of the store gets to finish before an abort or suspend.
_JOIN_S = 1.0
#: Seconds that the abort or suspend itself may take if that write is stuck.
_CLEAN_UP_S = 10.0

_log = logging.getLogger("ssvm.disk_buffer")


class RingFile:
    """Ring buffer of *size* bytes in an unlinked temporary file.

    One thread puts chunks and another takes them. The file is closed when the last reference to this object ends.
    So no thread can use a descriptor that was closed and reused for another file.
    Raises OSError if the directory is not writable or the disk is full.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.size = size
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            self._fd = os.dup(file.fileno())
        self._write_at = self._read_at = 0

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def put(self, chunk: bytes) -> None:
        """Append a chunk. The caller must know that there is room for it."""
        first = min(len(chunk), self.size - self._write_at)
        for data, at in ((chunk[:first], self._write_at), (chunk[first:], 0)):
            while data:
                done = os.pwrite(self._fd, data, at)
                data, at = data[done:], at + done
        self._write_at = (self._write_at + len(chunk)) % self.size

    def take(self, size: int) -> bytes:
        """Return the next *size* bytes, which were put as one chunk."""
        first = min(size, self.size - self._read_at)
        data = os.pread(self._fd, first, self._read_at)
        if first < size:
            data += os.pread(self._fd, size - first, 0)
        self._read_at = (self._read_at + size) % self.size
        return data


class DiskBuffer(LeavingAborts):
    """A ``Sink`` that buffers the sink *inner*.

    The caller enters *inner* before this sink and leaves it afterwards. *limit* is the size in bytes of the scratch
    file in *directory*. If the file is full, a *patient* buffer makes the stream wait. Any other raises
    StoreUnavailable. *check* is called while the stream waits. A store that takes nothing for ``STALL_S`` seconds, or
    that *slowness* detects, also raises StoreUnavailable.
    Memory: QUEUE_SIZE bytes and the chunk that is being written.
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
        self._ring: RingFile | None = None
        #: Chunks in memory, and the sizes of chunks that are in the file, in the order of the stream.
        self._queue: deque[bytes | int] = deque()
        self._bytes_in_memory = self._bytes_in_file = 0
        self._chunks_written = self._bytes_written = 0
        self._busy = self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="disk-buffer", daemon=True)
        self._thread.start()

    def write(self, chunk: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._fits_in_memory(chunk) or self._error or self._stopped, HOLD_S)
            self._wait(lambda: self._fits_in_memory(chunk) or self._has_room(chunk) or not self._patient)
            if self._fits_in_memory(chunk):
                self._bytes_in_memory += room_of(chunk)
                self._add(chunk)
                return
            if not self._has_room(chunk):
                raise self._too_slow()
            self._bytes_in_file += len(chunk)
        try:
            ring = self._ring = self._ring or RingFile(self._directory, self._limit)
            ring.put(chunk)
        except OSError as error:
            _log.warning("The scratch file in %s failed and is not used any more: %s", self._directory, error)
            with self._changed:
                self._bytes_in_file -= len(chunk)
                self._limit = 0
            self.write(chunk)
            return
        self.spilled += len(chunk)
        with self._changed:
            self._add(len(chunk))

    def resumed(self) -> Iterator[bytes]:
        return self._inner.resumed()

    def sync(self) -> int:
        return self._inner.sync()

    def commit(self) -> StoredObject:
        with self._changed:
            self._wait(lambda: not self._queue and not self._busy)
        self._stop()
        return self._inner.commit()

    def abort(self) -> None:
        self._give_up(self._inner.abort)

    def suspend(self) -> None:
        self._give_up(self._inner.suspend)

    # Called by the thread of the stream.

    def _fits_in_memory(self, chunk: bytes) -> bool:
        return self._bytes_in_memory + room_of(chunk) <= QUEUE_SIZE

    def _has_room(self, chunk: bytes) -> bool:
        return self._limit - self._bytes_in_file >= len(chunk)

    def _add(self, item: bytes | int) -> None:
        self._queue.append(item)
        self._changed.notify_all()

    def _wait(self, until: Callable[[], bool]) -> None:
        """Wait until *until* returns True, or raise the error that prevents it. The caller holds the condition."""
        began = time.monotonic()
        written, deadline = self._chunks_written, began + STALL_S
        while self._error is None and not self._stopped and not until():
            self._changed.wait(_POLL_S)
            self._check()
            now = time.monotonic()
            if self._slowness.is_too_slow(now, self._waited_s + now - began, self._bytes_written):
                raise self._slowness.error(self.key)
            if self._chunks_written != written:
                written, deadline = self._chunks_written, time.monotonic() + STALL_S
            elif time.monotonic() > deadline:
                raise self._too_slow()
        self._waited_s += time.monotonic() - began
        if self._error is not None:
            raise self._error

    def _too_slow(self) -> StoreUnavailable:
        what = f"The store is too slow: {human_size(self.spilled)} went through the scratch file"
        return StoreUnavailable(what, self.key, "Check this store, or raise backup.spill_bytes")

    # Called by the thread of the store.

    def _run(self) -> None:
        while (item := self._next()) is not None:
            size = item if isinstance(item, int) else len(item)
            try:
                self._inner.write(self._read_back(item) if isinstance(item, int) else item)
            except BaseException as error:  # noqa: BLE001 - handed over to the thread that writes
                self._error = error
            with self._changed:
                self._chunks_written += 1
                self._bytes_written += size
                self._bytes_in_file -= size if isinstance(item, int) else 0
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
            self._bytes_in_memory -= room_of(item) if isinstance(item, bytes) else 0
            self._changed.notify_all()
            return item

    def _read_back(self, size: int) -> bytes:
        if (ring := self._ring) is None:
            raise StoreUnavailable("The write was aborted", self.key)
        return ring.take(size)

    # The end.

    def _stop(self, timeout_s: float | None = None) -> bool:
        """Stop the thread of the store. Return whether it has ended within *timeout_s*."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._ring = None
        return not self._thread.is_alive()

    def _give_up(self, step: Callable[[], None]) -> None:
        """Abort or suspend the inner sink once.

        If the store is stuck in a write, *step* runs in another thread and may end that write.
        """
        again = self._stopped
        if self._stop(0 if again else _JOIN_S):
            step()
        elif not again:
            cleaner = threading.Thread(target=step, name="clean-up", daemon=True)
            cleaner.start()
            cleaner.join(_CLEAN_UP_S)
            self._stop(0)
