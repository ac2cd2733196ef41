"""Write one stream to several sinks in one pass, each in its own thread behind a bounded queue.

    stored = store_stream(chunks, sinks, observers=[hasher], verify=checks)

The first error of a sink is kept. Its thread then empties its queue, so that a dead sink never blocks the stream.
The next ``put`` or ``finish`` raises the error.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ssvm_worker.errors import Cancelled, ResourceBusy, StoreUnavailable, WorkerError
from ssvm_worker.units import MiB, human_size

from .interfaces import Check, Observer, Sink, StoredObject

_log = logging.getLogger("ssvm.stream")
#: Chunks that wait in one lane. A chunk is 1 MiB at the most, so a lane holds 5 MiB at the most; 4 to 8 are as fast.
DEPTH = 5
#: Seconds between two looks at the stop flag while a lane is full.
_POLL_S = 0.5
#: Seconds that a sink gets to take its last chunk when all is given up: a cancel is promised within two.
_PROMPTLY_S = 1.0
#: Seconds that its clean-up gets when it does not.
_PATIENCE_S = 10.0


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


@dataclass
class StreamResult:
    """What ``store_stream`` did: the objects by store name, and the stores that are still owed theirs."""

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
    """Store the stream under every sink, or under none.

    Every chunk goes to the observers, which share a thread, and to each sink in a thread of its own. When the stream
    has ended and all of it is written, *verify* runs, then the sinks commit in their order. The first sink is the
    primary and must succeed; another that fails, during the stream or at its commit, is reported as owed, as is one
    that takes less than *min_rate* bytes a second while all others wait for it; 0 allows any rate.
    The stream begins at byte 0 always; a sink that resumes is given only what it does not have.
    Bytes: holds at most lane.DEPTH chunks for each sink and for the observers.
    Raises: what the source, an observer, *verify*, *check* or the primary raises; every sink is aborted first, or
    suspended where *keep* says so of the error. Repeat: not after an error; open new sinks.
    """
    _settle_allocator()
    if not sinks:
        raise ValueError("a stream without a sink")
    flow = _Flow(sinks, check)
    try:
        flow.start(observers, min_rate)
        for chunk in chunks:
            flow.put(chunk)
        flow.drain()
        verify()
        check()
        return flow.commit()
    except BaseException as error:
        flow.give_up(keep(error))
        raise


def _settle_allocator() -> None:
    """Make glibc keep the memory of freed chunks for the next ones, rather than hand each back to the kernel.

    Freeing a large block raises both of its thresholds (mallopt(3), "dynamic mmap threshold"); the zeroed block is
    never touched and costs nothing. Over a stream of 2 GiB, 140,000 page faults became 7,000, a tenth of the CPU time.
    """
    bytes(16 * MiB)


class _Flow:
    """The lanes of one ``store_stream``."""

    def __init__(self, sinks: Mapping[str, Sink], check: Check) -> None:
        self._check = check
        self._sinks = dict(sinks)
        self._primary = next(iter(sinks))
        self._owed: dict[str, WorkerError] = {}
        self._lanes: dict[str, SinkThread] = {}

    def start(self, observers: Sequence[Observer], min_rate: int) -> None:
        """Start the threads; if one cannot be started, ``give_up`` ends the others."""
        self._taps = SinkThread("observers", _each(observers))
        for name, sink in self._sinks.items():
            # What is on the disk for good before the commit, while *check* is heard, need not be waited for in it.
            slowness = SlowSinkDetector(0 if name == self._primary else min_rate)
            write = _behind(sink.offset, sink.write)
            self._lanes[name] = SinkThread(name, write, slowness=slowness, settle=sink.settle)

    def put(self, chunk: bytes) -> None:
        self._check()
        self._taps.put(chunk, self._check)
        for name, lane in list(self._lanes.items()):
            self._secondary_may_fail(name, lambda lane=lane: lane.put(chunk, self._check))  # type: ignore[misc]

    def drain(self) -> None:
        self._taps.finish(self._check)
        for name, lane in list(self._lanes.items()):
            self._secondary_may_fail(name, lambda lane=lane: lane.finish(self._check))  # type: ignore[misc]

    def commit(self) -> StreamResult:
        stored = StreamResult(owed=self._owed)
        for name in list(self._lanes):
            self._secondary_may_fail(name, lambda name=name: self._commit(name, stored))  # type: ignore[misc]
        return stored

    def _commit(self, name: str, stored: StreamResult) -> None:
        stored.objects[name] = self._sinks[name].commit()

    def _secondary_may_fail(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except WorkerError as error:
            if name == self._primary or isinstance(error, Cancelled):
                raise
            self._owed[name] = error
            sink = self._sinks.pop(name)
            if self._lanes.pop(name).drop(_PROMPTLY_S):
                _clean_up(sink.abort)
            else:
                _clean_up_beside(sink.abort)

    def give_up(self, keep: bool) -> None:
        if taps := getattr(self, "_taps", None):
            taps.drop()
        for name, sink in self._sinks.items():
            lane = self._lanes.get(name)
            step = sink.suspend if keep else sink.abort
            if lane is None or lane.drop(_PROMPTLY_S, take=keep):
                _clean_up(step)
            else:
                _clean_up_beside(step)


def _clean_up_beside(step: Callable[[], None]) -> None:
    """Clean up though the sink's own thread is stuck in it, which may free that, but be not held up by it."""
    beside = threading.Thread(target=_clean_up, args=(step,), name="clean-up", daemon=True)
    beside.start()
    beside.join(_PATIENCE_S)


def _clean_up(step: Callable[[], None]) -> None:
    """Abort or suspend a sink; a store that fails at that too leaves its part to ``sweep``.

    Its error must not take the place of the one that is being raised (a cancel would turn into a retry), nor cost the
    other sinks their clean-up.
    """
    try:
        step()
    except Exception as error:  # noqa: BLE001 - see above
        _log.warning("Cleaning up failed, the next sweep will see to it: %s", error)


def _behind(offset: int, write: Observer) -> Observer:
    """Write only what lies behind the first *offset* bytes, which the sink has already."""
    left = offset

    def write_rest(chunk: bytes) -> None:
        nonlocal left
        if left >= len(chunk):
            left -= len(chunk)
            return
        write(chunk[left:] if left else chunk)
        left = 0

    return write_rest


def _each(observers: Sequence[Observer]) -> Observer:
    def see(chunk: bytes) -> None:
        for observe in observers:
            observe(chunk)

    return see
