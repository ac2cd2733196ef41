"""The steps that a chunk passes between its source and ``store_stream``: resume, limit rate and size, observe.

Standard library only.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

from ssvm_worker.errors import SourceUnavailable, TooLarge
from ssvm_worker.units import MiB, human_size

from .interfaces import Observer, Owner, Source, Store, StoredObject

RAISE_LIMIT = "Raise max_bytes in the request, or download.max_bytes in the settings"
#: Bytes of progress that reset the counter of failures in a row.
WORTH_IT = MiB
#: The longest pause in seconds that a source can ask for within one attempt. The next attempt waits for the rest.
_LONGEST_WAIT_S = 60.0
#: Unused rate that may be used at once after a pause, in seconds of that rate.
_BURST_S = 0.1


class Resuming:
    """Yield the bytes of a source exactly once, and reopen the source at the offset where it broke.

    This is the only retry at the level of bytes. Consumers keep all state, so they do not notice a failure.
    A source that is not resumable is opened again only if it has yielded nothing.
    The counter of failures restarts after WORTH_IT bytes of progress. So a source that trickles cannot hold a job
    without limit. *tries* is the number of failures in a row that are retried. The pause after the first failure is
    *delay_s* seconds. It doubles with each failure, up to 30 s. *wait* sleeps for some seconds.
    Raises SourceUnavailable after the last try.
    """

    def __init__(
        self, source: Source, wait: Callable[[float], None], *, offset: int = 0, tries: int = 5, delay_s: float = 1.0
    ) -> None:
        self.source = source
        #: How often the stream was resumed, after a failure or from the bytes of an earlier attempt.
        self.resumptions = 1 if offset else 0
        self._wait = wait
        self._offset = offset
        self._tries = tries
        self._delay_s = delay_s

    def __iter__(self) -> Iterator[bytes]:
        failures, last_failure_at = 0, self._offset
        while True:
            try:
                with closing(self.source.open(self._offset)) as chunks:
                    for chunk in chunks:
                        self._offset += len(chunk)
                        yield chunk
                return
            except SourceUnavailable as error:
                wanted_s = min(_LONGEST_WAIT_S, error.after_s)
                failures = 1 if self._offset - last_failure_at >= WORTH_IT else failures + 1
                last_failure_at = self._offset
                if failures > self._tries or (self._offset and not self.source.resumable):
                    raise
            self.resumptions += bool(self._offset)
            self._wait(max(wanted_s, min(30.0, self._delay_s * 2 ** (failures - 1))))


class SharedRateLimit:
    """Rate limit in bytes a second that a process shares with its forks.

    The state is one number: the time until which the bytes so far use up the rate. It is in shared memory, which needs
    no directory. A record lock excludes other processes, and the kernel releases it if its holder dies. A record lock
    does not exclude threads of the same process, so threads use a second lock. Thread-safe.
    """

    def __init__(self) -> None:
        memory = os.memfd_create("ssvm-pace", os.MFD_CLOEXEC)
        self._file = open(memory, "r+b", buffering=0)  # noqa: SIM115 - closed with the last reference
        self._file.truncate(8)
        self._threads = threading.Lock()

    def delay(self, size: int, rate: float) -> float:
        """Count *size* bytes, and return the seconds to wait before they may pass at *rate* bytes a second."""
        now = time.monotonic()  # every process of a machine has the same clock
        file = self._file.fileno()
        with self._threads:
            fcntl.lockf(file, fcntl.LOCK_EX)
            try:
                (used_until,) = struct.unpack("d", os.pread(file, 8, 0))
                used_until = max(used_until, now - _BURST_S) + size / rate
                os.pwrite(file, struct.pack("d", used_until), 0)
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN)
        return max(0.0, float(used_until) - now)


def paced(
    chunks: Iterable[bytes], limits: Sequence[tuple[SharedRateLimit, float]], wait: Callable[[float], None]
) -> Iterator[bytes]:
    """Yield the chunks no faster than each of the rates (bytes a second) allows.

    *wait* sleeps for some seconds. An exception of *wait* propagates.
    """
    for chunk in chunks:
        if delay := max((limit.delay(len(chunk), rate) for limit, rate in limits), default=0.0):
            wait(delay)
        yield chunk


def tap(chunks: Iterable[bytes], *observers: Observer) -> Iterator[bytes]:
    """Call each observer with each chunk, then yield the chunk.

    The caller's thread runs the observers, so they must be fast.
    """
    for chunk in chunks:
        for observe in observers:
            observe(chunk)
        yield chunk


def limit(chunks: Iterable[bytes], max_bytes: int, location: str) -> Iterator[bytes]:
    """Yield the chunks. Raise TooLarge instead of yielding the chunk that exceeds *max_bytes*."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > max_bytes:
            what = f"More than the {human_size(max_bytes)} ({max_bytes} bytes) that are allowed"
            raise TooLarge(what, location, RAISE_LIMIT)
        yield chunk


def first_bytes(chunks: Iterable[bytes], size: int) -> tuple[bytes, Iterator[bytes]]:
    """Return the first *size* bytes or fewer, and an iterator over all chunks. Holds the chunks that were read."""
    chunks, held, seen = iter(chunks), [], 0
    while seen < size and (chunk := next(chunks, b"")):
        held.append(chunk)
        seen += len(chunk)
    return b"".join(held)[:size], itertools.chain(held, chunks)


def put_bytes(
    store: Store, key: str, data: bytes, owner: Owner, confirm: Callable[[], None] = lambda: None
) -> StoredObject:
    """Store a small object completely, or nothing of it.

    *confirm* is called before the commit, when the uncommitted bytes are visible in the store. A worker that takes
    over the job after that call finds these bytes and removes them.
    """
    with store.writer(key, len(data), owner=owner) as sink:
        if data:
            sink.write(data)
        confirm()
        return sink.commit()


def read_bytes(store: Store, key: str, max_bytes: int = 16 * MiB) -> bytes:
    """Return a small object. Raise TooLarge if it has more than *max_bytes*."""
    return b"".join(limit(store.reader(key).open(), max_bytes, key))
