"""Move one stream from its source to several sinks in one pass: resume, limit rate and size, observe, store.

    stored = store_stream(tap(limit(Resuming(source, wait), max_bytes, name), count), sinks, [hasher], verify=checks)

Each sink has its own thread behind a bounded queue. The thread keeps the first error of the sink. It then discards its
queue, so that a failed sink never blocks the stream. The next ``put`` or ``finish`` raises the error.

Standard library only.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

from ssvm_worker.errors import Cancelled, ResourceBusy, SourceUnavailable, StoreUnavailable, TooLarge, WorkerError
from ssvm_worker.units import MiB, human_size

from .interfaces import BURST, CHUNK, Check, Observer, Owner, Sink, Source, Store, StoredObject

_log = logging.getLogger("ssvm.stream")
RAISE_LIMIT = "Raise max_bytes in the request, or download.max_bytes in the settings"
#: Bytes of progress that reset the counter of failures in a row.
WORTH_IT = MiB
#: The longest pause in seconds that a source can ask for within one attempt. The next attempt waits for the rest.
_LONGEST_WAIT_S = 60.0
#: Unused rate that may be used at once after a pause, in seconds of that rate.
_BURST_S = 0.1
#: The maximum of bytes in one queue: two bursts, or seven smaller chunks. With five of these, a backup to a directory
#: and S3 takes a twelfth more time.
QUEUE_SIZE = 2 * BURST
#: Seconds between two calls of *check* while a queue is full.
_POLL_S = 0.5
#: Seconds that a sink gets to consume its last chunk after a failure. A cancel must take effect within 2 s.
_JOIN_S = 1.0
#: Seconds that the clean-up of a sink may take if its thread is stuck.
_CLEAN_UP_S = 10.0


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
        memory = os.memfd_create("ssvm-rate-limit", os.MFD_CLOEXEC)
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


class SlowSinkDetector:
    """Detector of a sink that makes progress, but so slowly that it delays all other sinks.

    It measures in windows. A sink is too slow in a window if both conditions hold:

    - the stream waited for the sink during more than half of the window,
    - the sink consumed less than *rate* bytes a second.

    So a slow source is not blamed on the sink, since the stream does not wait for the sink then. A *rate* of 0 allows
    every speed.
    """

    def __init__(self, rate: int, window_s: float = 30.0) -> None:
        self.rate = rate
        self._window_s = window_s
        self._since = time.monotonic()
        self._waited_s = 0.0
        self._consumed = 0

    def is_too_slow(self, now: float, waited_s: float, consumed: int) -> bool:
        """Return whether the sink was too slow in a window that ends *now*.

        *waited_s* and *consumed* (bytes) are totals since the start of the stream.
        """
        elapsed = now - self._since
        if not self.rate or elapsed < self._window_s:
            return False
        window_waited_s, window_consumed = waited_s - self._waited_s, consumed - self._consumed
        self._since, self._waited_s, self._consumed = now, waited_s, consumed
        return window_waited_s > elapsed / 2 and window_consumed < self.rate * elapsed

    def error(self, name: str) -> StoreUnavailable:
        """Return the error for the store of that name."""
        what = f"The store takes less than {human_size(self.rate)} a second, and all others wait for it"
        return StoreUnavailable(what, name, "A copy job follows. Check this store, or lower worker.min_store_rate")


class SinkThread:
    """Thread that calls *consume* with every chunk of a bounded queue.

    ``put`` waits while the queue has no room. The queue itself is unbounded, so ``stop`` can always add the end, also
    behind a consumer that is stuck.
    """

    def __init__(
        self,
        name: str,
        consume: Callable[[bytes], None],
        stall_s: float = 300.0,
        *,
        slowness: SlowSinkDetector | None = None,
        sync: Callable[[], object] = lambda: None,
    ) -> None:
        """Start the thread. It calls *sync* after the last chunk if all chunks were consumed.

        Raises ResourceBusy if the system cannot start a thread.
        """
        self.name = name
        self.error: BaseException | None = None
        self._consume = consume
        self._stall_s = stall_s
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        #: Bytes that the queue holds or has reserved. Guarded by the condition.
        self._queued = 0
        self._taken = threading.Condition()
        self._slowness = slowness or SlowSinkDetector(0)
        self._sync = sync
        self._waited_s = 0.0
        self._chunks_taken = self._bytes_consumed = 0
        self._discarding = self._finishing = False
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            what = f"No thread can be started: {error}"
            raise ResourceBusy(what, name, "Lower worker.concurrency, or raise the limit of tasks") from error

    def put(self, chunk: bytes, check: Callable[[], None]) -> None:
        """Queue a chunk. While the queue is full, wait and call *check* twice a second.

        Raises the error of the consumer and the error of *check*. Raises StoreUnavailable if the consumer takes
        nothing for *stall_s* seconds.
        """
        self._wait(partial(self._reserve, room_of(chunk)), check)
        self._chunks.put(chunk)
        if self.error is not None:
            raise self.error

    def finish(self, check: Callable[[], None]) -> None:
        """Wait until every chunk is consumed. Raises the same errors as ``put``."""
        self._finishing = True
        self._chunks.put(None)
        self._wait(self._has_ended, check)
        if self.error is not None:
            raise self.error

    def stop(self, timeout_s: float = 30.0, *, drain: bool = False) -> bool:
        """Stop the thread, and discard the queued chunks unless *drain* is set.

        With *drain* the thread consumes the queued chunks for up to *timeout_s*. Returns False if the consumer is stuck
        and its thread still runs.
        """
        self._discarding = not drain
        self._chunks.put(None)
        self._thread.join(timeout_s)
        self._discarding = True
        return not self._thread.is_alive()

    def _reserve(self, size: int) -> bool:
        """Wait for room in the queue and take it. Return False if there is none in time."""
        with self._taken:
            has_room = self._taken.wait_for(lambda: self._queued + size <= QUEUE_SIZE, _POLL_S)
            if has_room:
                self._queued += size
        return has_room

    def _has_ended(self) -> bool:
        self._thread.join(_POLL_S)
        return not self._thread.is_alive()

    def _wait(self, until: Callable[[], bool], check: Callable[[], None]) -> None:
        """Repeat *until*, which blocks for up to ``_POLL_S``, as long as the consumer makes progress."""
        began = time.monotonic()
        taken, deadline = self._chunks_taken, began + self._stall_s
        while not until():
            check()
            self._raise_if_too_slow(time.monotonic() - began)
            if self._chunks_taken != taken:
                taken, deadline = self._chunks_taken, time.monotonic() + self._stall_s
            elif time.monotonic() > deadline:
                what = f"The consumer took no data for {self._stall_s:.0f} s"
                raise StoreUnavailable(what, self.name, "Check this store")
        self._waited_s += time.monotonic() - began
        self._raise_if_too_slow()

    def _raise_if_too_slow(self, waiting_s: float = 0.0) -> None:
        if self._slowness.is_too_slow(time.monotonic(), self._waited_s + waiting_s, self._bytes_consumed):
            raise self._slowness.error(self.name)

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._chunks_taken += 1
            with self._taken:
                self._queued -= room_of(chunk)
                self._taken.notify()
            if self.error is None and not self._discarding:
                try:
                    self._consume(chunk)
                    self._bytes_consumed += len(chunk)
                except BaseException as error:  # noqa: BLE001 - handed over to the thread that puts
                    self.error = error
        if self._finishing and self.error is None and not self._discarding:
            try:
                self._sync()
            except BaseException as error:  # noqa: BLE001 - as above
                self.error = error


def room_of(chunk: bytes) -> int:
    """Return the bytes that a chunk takes in a queue. The minimum limits the number of tiny chunks."""
    return max(len(chunk), CHUNK)


@dataclass
class StreamResult:
    """Result of ``store_stream``: the objects by store name, and the error of each store that lacks its object."""

    objects: dict[str, StoredObject] = field(default_factory=dict)
    owed: dict[str, WorkerError] = field(default_factory=dict)


def store_stream(  # noqa: PLR0913 - three by position; the others only by name
    chunks: Iterable[bytes],
    sinks: Mapping[str, Sink],
    observers: Sequence[Observer] = (),
    *,
    verify: Callable[[], None] = lambda: None,
    check: Check = lambda: None,
    keep: Callable[[BaseException], bool] = lambda _: False,
    min_rate: int = 0,
) -> StreamResult:
    """Store the stream in every sink, or in none.

    1. Every chunk goes to the observers, which share one thread, and to the thread of each sink.
    2. *verify* runs when the stream has ended and every sink has written all of it.
    3. The sinks commit in their order.

    The first sink is the primary and must succeed. Another sink may fail during the stream or at its commit. It may
    also take less than *min_rate* bytes a second while all others wait for it; 0 allows any rate. Such a sink is
    aborted and reported as owed.
    The stream always starts at byte 0. A resumed sink gets only the bytes that it lacks.
    Memory: the slowest sink determines it. At most QUEUE_SIZE bytes wait for it, and three more chunks are in use.
    Raises the error of the source, an observer, *verify*, *check* or the primary. Before that, it aborts every sink,
    or suspends it if *keep* returns True for the error. The same sinks cannot be used again after an error.
    """
    # Make glibc reuse the memory of freed chunks instead of returning each chunk to the kernel. Freeing a large block
    # raises two thresholds of glibc (mallopt(3), "dynamic mmap threshold"). The zeroed block is never touched, so it
    # costs nothing. Measured for a stream of 2 GiB: 7,000 page faults instead of 140,000, and a tenth less CPU time.
    bytes(16 * MiB)
    if not sinks:
        raise ValueError("a stream without a sink")
    flow = _Flow(sinks, check)
    try:
        flow.start(observers, min_rate)
        for chunk in chunks:
            flow.put(chunk)
        flow.finish()
        verify()
        check()
        return flow.commit()
    except BaseException as error:
        flow.give_up(keep(error))
        raise


class _Flow:
    """The sinks of one ``store_stream`` with their threads."""

    def __init__(self, sinks: Mapping[str, Sink], check: Check) -> None:
        self._check = check
        self._sinks = dict(sinks)
        self._primary = next(iter(sinks))
        self._owed: dict[str, WorkerError] = {}
        self._threads: dict[str, SinkThread] = {}
        self._observers: SinkThread | None = None

    def start(self, observers: Sequence[Observer], min_rate: int) -> None:
        """Start the threads. If one cannot be started, ``give_up`` ends the others."""

        def observe(chunk: bytes) -> None:
            for each in observers:
                each(chunk)

        self._observers = SinkThread("observers", observe)
        for name, sink in self._sinks.items():
            # Each thread syncs its sink while *check* is still called, so that the commit takes less time.
            slowness = SlowSinkDetector(0 if name == self._primary else min_rate)
            write = _skip_first(sink.offset, sink.write)
            self._threads[name] = SinkThread(name, write, slowness=slowness, sync=sink.sync)

    def put(self, chunk: bytes) -> None:
        self._check()
        if self._observers:
            self._observers.put(chunk, self._check)
        for name, thread in list(self._threads.items()):
            self._secondary_may_fail(name, partial(thread.put, chunk, self._check))

    def finish(self) -> None:
        if self._observers:
            self._observers.finish(self._check)
        for name, thread in list(self._threads.items()):
            self._secondary_may_fail(name, partial(thread.finish, self._check))

    def commit(self) -> StreamResult:
        stored = StreamResult(owed=self._owed)

        def commit_one(name: str) -> None:
            stored.objects[name] = self._sinks[name].commit()

        for name in list(self._threads):
            self._secondary_may_fail(name, partial(commit_one, name))
        return stored

    def _secondary_may_fail(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except WorkerError as error:
            if name == self._primary or isinstance(error, Cancelled):
                raise
            self._owed[name] = error
            sink = self._sinks.pop(name)
            _clean_up(sink.abort, is_stuck=not self._threads.pop(name).stop(_JOIN_S))

    def give_up(self, keep: bool) -> None:
        if self._observers:
            self._observers.stop()
        for name, sink in self._sinks.items():
            thread = self._threads.get(name)
            is_stuck = thread is not None and not thread.stop(_JOIN_S, drain=keep)
            _clean_up(sink.suspend if keep else sink.abort, is_stuck=is_stuck)


def _clean_up(step: Callable[[], None], *, is_stuck: bool) -> None:
    """Abort or suspend a sink, and log an error of that. ``sweep`` removes what is left then.

    Such an error must not replace the error that is being raised: a cancel would become a retry. It must also not
    prevent the clean-up of other sinks. If the thread of the sink is stuck, *step* runs in another thread for a limited
    time. It may end the call that is stuck.
    """

    def run() -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - see above
            _log.warning("The clean-up of a sink failed, the next sweep removes the rest: %s", error)

    if not is_stuck:
        run()
        return
    cleaner = threading.Thread(target=run, name="clean-up", daemon=True)
    cleaner.start()
    cleaner.join(_CLEAN_UP_S)


def _skip_first(offset: int, write: Observer) -> Observer:
    """Return a function that drops the first *offset* bytes of the stream and writes the rest."""
    left = offset

    def write_rest(chunk: bytes) -> None:
        nonlocal left
        if left >= len(chunk):
            left -= len(chunk)
            return
        write(chunk[left:] if left else chunk)
        left = 0

    return write_rest


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
    """Store a small object completely, or store no byte.

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
