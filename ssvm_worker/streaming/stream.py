"""How bytes move: the nouns (Source, Sink, Store) and the one loop that moves them.

    chunks = resuming(source, ...)                           # the same bytes once, whatever breaks on the way
    stored = store_stream(chunks, sinks, observers=[hasher], verify=checks)

A chunk is a non-empty, immutable ``bytes`` of 1 MiB at the most; it is shared between threads and never copied.
Sizes of chunks mean nothing; their order and concatenation mean everything.
"""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, Self

from ssvm_worker.errors import Cancelled, SourceUnavailable, TooLarge, WorkerError
from ssvm_worker.units import MiB, human_size

from .sink_thread import SinkThread, SlowSinkDetector

#: The largest chunk. On two cores one of 256 KiB costs a third more time for each byte, 512 KiB a sixth; 2 MiB no less.
CHUNK = MiB

_log = logging.getLogger("ssvm.stream")

#: Seconds that a sink gets to take its last chunk when all is given up: a cancel is promised within two.
_PROMPTLY_S = 1.0
#: Seconds that its clean-up gets when it does not.
_PATIENCE_S = 10.0

Observer = Callable[[bytes], None]
Check = Callable[[], None]


@dataclass(frozen=True)
class StoredObject:
    """One committed object of a store."""

    key: str
    #: Bytes, as the store itself reports them.
    size: int
    #: ``sha256:HEX`` where it is known; the manifest is the place to look for it.
    digest: str | None = None
    #: Seconds since the epoch.
    when: float = 0.0


@dataclass(frozen=True)
class Owner:
    """Who writes: the job and its fencing token, so that a part left behind can be told from one that is in use."""

    job_id: str = "local"
    token: int = 0


@dataclass(frozen=True)
class StoreUsage:
    """Bytes of a store; None where the store cannot know."""

    total: int | None
    used: int | None
    free: int | None


class Source(Protocol):
    """Gives the bytes of one object."""

    @property
    def name(self) -> str:
        """Safe to log: no credentials."""

    @property
    def size(self) -> int | None:
        """Bytes on the wire; known at the latest when the first chunk has come, if ever."""

    @property
    def resumable(self) -> bool:
        """Whether ``open`` takes an offset; known after the first open."""

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on, of the *same* object as the first open gave.

        Raises SourceChanged when it no longer is, SourceUnavailable when the bytes end early or stop coming.
        """


class Sink(Protocol):
    """Takes the bytes of one object. A context manager: leaving it aborts, unless it was committed or suspended."""

    key: str
    #: Bytes that an earlier attempt has left here, when the writer was asked to resume; ``write`` goes on behind them.
    offset: int

    def write(self, chunk: bytes) -> None: ...

    def resumed(self) -> Iterator[bytes]:
        """The chunks of the first ``offset`` bytes, for the hashes; empty when there are none."""

    def commit(self) -> StoredObject:
        """Make the object visible, whole and durable under its key, with its size read back from the store."""

    def abort(self) -> None:
        """Leave nothing behind; safe to repeat, from several threads, and after a commit, which it does not undo."""

    def suspend(self) -> None:
        """Keep what was written for a later attempt, where the store can; else abort."""

    def settle(self) -> int:
        """How many of the first bytes another attempt finds whatever becomes of this host, which this call sees to.

        For another thread than the one that writes; 0 where the store keeps nothing of an object that is not whole.
        """

    def __enter__(self) -> Sink: ...

    def __exit__(self, *exc: object) -> None: ...


class LeavingAborts:
    """Leaving the ``with`` block aborts; ``abort`` itself does nothing once the sink is committed or suspended."""

    key: str

    @abstractmethod
    def abort(self) -> None:
        """Leave nothing behind. Several threads may call it at once."""

    def settle(self) -> int:
        """Nothing can be relied upon before the commit."""
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Abort; an error of the abort never takes the place of the error in the block."""
        try:
            self.abort()
        except Exception as failed:
            if exc[1] is None:
                raise
            _log.warning("%s: the abort failed too, the next sweep removes what is left: %s", self.key, failed)


class Store(Protocol):
    """An image store. Keys are checked by ``keys.check_key``; the conformance suite says all that is promised."""

    #: The name in the settings.
    name: str
    #: Safe to log: no credentials.
    url: str
    #: Whether a writer asked to resume may find bytes of an earlier attempt.
    resumable: bool

    def writer(
        self,
        key: str,
        size_hint: int | None = None,
        *,
        owner: Owner,
        resume: bool = False,
        most: int | None = None,
        twin: Store | None = None,
    ) -> Sink:
        """A sink for *key*; *size_hint* (bytes) sizes S3 parts and is checked against the free space (StoreFull).

        Asked to *resume*, it goes on with what an earlier attempt of the job has left of this very object: all, or the
        first *most* bytes, if no more can be relied upon (see Sink.settle). What is written is also the object of that
        key in *twin*: a server that holds both may copy what it then need not get.
        """

    def reader(self, key: str) -> Source:
        """A resumable source; ObjectNotFound when it is opened and nothing is there."""

    def stat(self, key: str) -> StoredObject:
        """Size and time of an object; ObjectNotFound."""

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Committed objects below *prefix*, a whole path component: ``a/2`` does not list ``a/20/x``. Sorted by key."""

    def delete(self, key: str) -> None:
        """Delete one object; missing is fine."""

    def sweep(self, older_than_s: float, prefix: str = "", *, spare: str = "") -> int:
        """Remove uncommitted writes below *prefix* untouched for older_than_s, but not those of job id *spare*.

        Returns how many there were.
        """

    def leftovers(self, prefix: str = "") -> Iterator[StoredObject]:
        """Uncommitted writes below *prefix*, those under way too: the key that each is for, bytes so far, last touched.

        What a sweep of that age would remove; a small object may have none before its commit.
        """

    def usage(self) -> StoreUsage: ...


@dataclass
class StreamResult:
    """What ``store_stream`` did: the objects by store name, and the stores that are still owed theirs."""

    objects: dict[str, StoredObject] = field(default_factory=dict)
    owed: dict[str, WorkerError] = field(default_factory=dict)


def tap(chunks: Iterable[bytes], *observers: Observer) -> Iterator[bytes]:
    """Pass every chunk on after each observer has seen it; for cheap observers, in the caller's thread."""
    for chunk in chunks:
        for observe in observers:
            observe(chunk)
        yield chunk


def limit(chunks: Iterable[bytes], most: int, where: str) -> Iterator[bytes]:
    """Pass the chunks on, and raise TooLarge in place of the one that goes beyond *most* bytes."""
    seen = 0
    for chunk in chunks:
        seen += len(chunk)
        if seen > most:
            raise TooLarge(f"More than the {human_size(most)} ({most} bytes) that are allowed", where, RAISE_LIMIT)
        yield chunk


RAISE_LIMIT = "Raise max_bytes in the request, or download.max_bytes in the settings"


#: Bytes between two breaks that make it worth while to go on with a source.
WORTH_IT = MiB
#: Seconds that a source may have us wait within an attempt; the next attempt waits for the rest.
_LONGEST_WAIT_S = 60.0


class Resuming:
    """Yields the bytes of a source exactly once, reopening it at the byte where it broke.

    The one byte-level retry in the house. State lives downstream, so nobody else knows that there was a failure.
    A source that is not resumable is tried again only while nothing has come of it. The tries start anew when
    WORTH_IT bytes have come since the last break: one that gives a little and stalls must not hold a job for ever.
    """

    def __init__(
        self, source: Source, wait: Callable[[float], None], *, offset: int = 0, tries: int = 5, delay_s: float = 1.0
    ) -> None:
        self.source = source
        #: How often the stream was taken up again, after a break or from an earlier attempt's bytes.
        self.resumptions = 1 if offset else 0
        self._wait = wait
        self._offset = offset
        self._tries = tries
        self._delay_s = delay_s

    def __iter__(self) -> Iterator[bytes]:
        failures, since = 0, self._offset
        while True:
            try:
                with closing(self.source.open(self._offset)) as chunks:
                    for chunk in chunks:
                        self._offset += len(chunk)
                        yield chunk
                return
            except SourceUnavailable as error:
                wanted = min(_LONGEST_WAIT_S, error.after_s)
                failures = 1 if self._offset - since >= WORTH_IT else failures + 1
                since = self._offset
                if failures > self._tries or (self._offset and not self.source.resumable):
                    raise
            self.resumptions += bool(self._offset)
            self._wait(max(wanted, min(30.0, self._delay_s * 2 ** (failures - 1))))


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


def put_bytes(
    store: Store, key: str, data: bytes, owner: Owner, confirm: Callable[[], None] = lambda: None
) -> StoredObject:
    """Store a small object, whole or not at all.

    *confirm* is called before the commit, when what is written can be seen: whoever takes the job over after that
    finds it, and takes it away.
    """
    with store.writer(key, len(data), owner=owner) as sink:
        if data:
            sink.write(data)
        confirm()
        return sink.commit()


def read_bytes(store: Store, key: str, most: int = 16 * MiB) -> bytes:
    """Read a small object; TooLarge above *most* bytes."""
    return b"".join(limit(store.reader(key).open(), most, key))
