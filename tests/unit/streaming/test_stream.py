"""The central loop: all stores or none, every byte once, and a break on the way is invisible downstream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from ssvm_worker.artifacts.checksums import Hasher, digest_of
from ssvm_worker.errors import (
    Cancelled,
    ChecksumMismatch,
    ObjectNotFound,
    ResourceBusy,
    SourceUnavailable,
    StoreFull,
    StoreUnavailable,
    TooLarge,
    WorkerError,
)
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import CHUNK, Owner, Sink, StoredObject
from ssvm_worker.streaming.pipeline import QUEUE_SIZE, SlowSinkDetector, limit, put_bytes, read_bytes, store_stream, tap
from tests.waiting import PATIENCE_S

ME = Owner("job", 1)
DATA = bytes(range(256)) * 40
CHUNKS = [DATA[start : start + 1000] for start in range(0, len(DATA), 1000)]


class Faulty:
    """A sink that fails at one step; ``abort`` may fail too."""

    def __init__(self, sink: Sink, step: str, error: Exception) -> None:
        self.key, self.offset = sink.key, sink.offset
        self._sink, self._step, self._error = sink, step, error

    def _do(self, step: str) -> None:
        if step == self._step:
            raise self._error

    def write(self, chunk: bytes) -> None:
        self._do("write")
        self._sink.write(chunk)

    def resumed(self) -> Iterator[bytes]:
        return self._sink.resumed()

    def commit(self) -> StoredObject:
        self._do("commit")
        return self._sink.commit()

    def abort(self) -> None:
        self._sink.abort()
        self._do("abort")

    def suspend(self) -> None:
        self._sink.suspend()

    def sync(self) -> int:
        return self._sink.sync()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()


@pytest.fixture
def primary() -> MemoryStore:
    return MemoryStore("primary")


@pytest.fixture
def second() -> MemoryStore:
    return MemoryStore("second")


@pytest.fixture
def sinks(primary: MemoryStore, second: MemoryStore) -> dict[str, Sink]:
    """Return a sink of each store."""
    return {store.name: store.writer("image", owner=ME) for store in (primary, second)}


def is_empty(store: MemoryStore) -> bool:
    """Return whether the store has no bytes, committed or not."""
    return not list(store.list()) and not store.uncommitted()


# All or none


def test_all(primary: MemoryStore, second: MemoryStore, sinks: dict[str, Sink]) -> None:
    """Every store has every byte, every observer received it, and the result says so."""
    hasher, seen = Hasher(), bytearray()
    stored = store_stream(CHUNKS, sinks, [hasher, seen.extend])
    assert [read_bytes(store, "image") for store in (primary, second)] == [DATA, DATA]
    assert (hasher.digest(), bytes(seen)) == (digest_of(DATA), DATA)
    assert ({name: each.size for name, each in stored.objects.items()}, stored.owed) == (
        {"primary": len(DATA), "second": len(DATA)},
        {},
    )


def test_empty_stream(primary: MemoryStore, sinks: dict[str, Sink]) -> None:
    """An empty stream makes an empty object; the source decides whether that is allowed."""
    store_stream([], sinks)
    assert read_bytes(primary, "image") == b""


def breaking(error: Exception) -> Iterator[bytes]:
    """Return a stream that breaks in the middle."""
    yield from CHUNKS[:5]
    raise error


def failing(error: Exception) -> Callable[..., None]:
    """Return a step that fails."""

    def fail(*_: object) -> None:
        raise error

    return fail


#: The failing argument of store_stream, and its error.
FAULTS = [
    pytest.param("chunks", SourceUnavailable("cut"), id="the source breaks off"),
    pytest.param("chunks", RuntimeError("bug"), id="the source has a bug"),
    pytest.param("observers", TooLarge("image"), id="an observer objects"),
    pytest.param("verify", ChecksumMismatch("wrong"), id="the checksum is wrong"),
    pytest.param("check", Cancelled("user"), id="a cancel"),
    pytest.param("write", StoreFull("full"), id="the primary is full"),
    pytest.param("commit", StoreUnavailable("gone"), id="the primary cannot commit"),
]


def store_with(fault: str, error: Exception, sinks: dict[str, Sink], **more: object) -> None:
    """Run the loop with one fault."""
    arguments: dict[str, object] = {"chunks": CHUNKS, "sinks": dict(sinks), **more}
    if fault == "chunks":
        arguments["chunks"] = breaking(error)
    elif fault == "observers":
        arguments["observers"] = [failing(error)]
    elif fault in ("write", "commit"):
        arguments["sinks"] = {**sinks, "primary": Faulty(sinks["primary"], fault, error)}
    else:
        arguments[fault] = failing(error)
    store_stream(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fault", "error"), FAULTS)
def test_none(primary: MemoryStore, second: MemoryStore, sinks: dict[str, Sink], fault: str, error: Exception) -> None:
    """Any failure raises its error, and leaves no bytes on any store."""
    with pytest.raises(type(error)) as caught:
        store_with(fault, error, sinks)
    assert caught.value is error
    assert is_empty(primary)
    assert is_empty(second)


@pytest.mark.parametrize(("fault", "error"), FAULTS)
def test_suspended(
    primary: MemoryStore, second: MemoryStore, sinks: dict[str, Sink], fault: str, error: Exception
) -> None:
    """After a temporary error the bytes are kept for the next attempt, but stay invisible."""
    with pytest.raises(type(error)):
        store_with(fault, error, sinks, keep=lambda each: each is error)
    assert [store.uncommitted() for store in (primary, second)] == [{"image"}, {"image"}]
    assert list(primary.list()) == list(second.list()) == []


def test_suspended_with_all_that_came(primary: MemoryStore) -> None:
    """All bytes before a break are kept, even if the store had not taken them yet."""
    sink, broken = primary.writer("image", owner=ME), threading.Event()

    def breaking() -> Iterator[bytes]:
        yield from CHUNKS[:5]
        broken.set()
        raise SourceUnavailable("gone", "source")

    class Slow(Faulty):
        def write(self, chunk: bytes) -> None:
            broken.wait(PATIENCE_S)
            self._sink.write(chunk)

    slow = Slow(sink, "", SourceUnavailable("never", "source"))
    with pytest.raises(SourceUnavailable):
        store_stream(breaking(), {"primary": slow}, keep=lambda _: True)
    (left,) = primary.leftovers()
    assert left.size == sum(map(len, CHUNKS[:5]))


def test_verify_runs_when_all_is_written(primary: MemoryStore, sinks: dict[str, Sink]) -> None:
    """The check before the commit runs after all bytes are hashed, and before any object exists."""
    hasher = Hasher()

    def verify() -> None:
        assert hasher.digest() == digest_of(DATA)
        with pytest.raises(ObjectNotFound):
            primary.stat("image")

    store_stream(CHUNKS, sinks, [hasher], verify=verify)


@pytest.mark.parametrize(("fault", "error"), FAULTS)
def test_failing_abort_hides_nothing(
    primary: MemoryStore, second: MemoryStore, sinks: dict[str, Sink], fault: str, error: Exception
) -> None:
    """A store whose abort fails does not replace the error, and does not prevent the other's clean-up."""
    sinks["primary"] = Faulty(sinks["primary"], "abort", StoreUnavailable("gone for good"))
    with pytest.raises(type(error)) as caught:
        store_with(fault, error, sinks)
    assert caught.value is error
    assert is_empty(second)


# The primary and the other stores


@pytest.mark.parametrize("step", ["write", "commit"])
def test_owed(primary: MemoryStore, second: MemoryStore, sinks: dict[str, Sink], step: str) -> None:
    """A failing secondary store does not affect the others, and is reported."""
    error = StoreUnavailable("gone", "second")
    stored = store_stream(CHUNKS, {**sinks, "second": Faulty(sinks["second"], step, error)})
    assert (read_bytes(primary, "image"), stored.owed) == (DATA, {"second": error})
    assert list(stored.objects) == ["primary"]
    assert is_empty(second)


def test_owed_that_cannot_abort(primary: MemoryStore, second: MemoryStore, sinks: dict[str, Sink]) -> None:
    """A failing clean-up of the failed store does not affect the primary either."""

    class Gone(Faulty):
        def _do(self, step: str) -> None:
            raise StoreUnavailable(f"no {step}")

    stored = store_stream(CHUNKS, {**sinks, "second": Gone(sinks["second"], "", ValueError())})
    assert (read_bytes(primary, "image"), list(stored.owed)) == (DATA, ["second"])


@pytest.mark.parametrize("error", [Cancelled("fenced"), RuntimeError("bug")], ids=["a cancel", "a bug"])
def test_not_owed(primary: MemoryStore, sinks: dict[str, Sink], error: Exception) -> None:
    """A cancel or a bug in any store ends the whole stream."""
    with pytest.raises(type(error)):
        store_stream(CHUNKS, {**sinks, "second": Faulty(sinks["second"], "write", error)})
    assert is_empty(primary)


def test_stuck_store_holds_back_the_source(sinks: dict[str, Sink]) -> None:
    """The source is never read further ahead of a store than its lane holds."""
    let_go, read = threading.Event(), 0
    calls: list[int] = []

    class Stuck(Faulty):
        def write(self, chunk: bytes) -> None:
            let_go.wait()

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b"x"

    def check() -> None:
        calls.append(read)
        if calls.count(read) > 1:  # asked again for the same chunk, because the lane is full
            let_go.set()
            raise Cancelled("user")

    with pytest.raises(Cancelled):
        store_stream(endless(), {"primary": Stuck(sinks["primary"], "", ValueError())}, check=check)
    assert read <= QUEUE_SIZE // CHUNK + 2  # the waiting chunks, the chunk in a write, and the chunk in a put


# Small things


def test_tap() -> None:
    """A tap sees every chunk before it forwards it."""
    seen: list[bytes] = []
    assert list(tap(CHUNKS, seen.append)) == CHUNKS == seen


@pytest.mark.parametrize("most", [len(DATA), len(DATA) + 1])
def test_limit_reached(most: int) -> None:
    """A limit forwards all bytes up to its maximum."""
    assert b"".join(limit(CHUNKS, most, "image")) == DATA


def test_limit_passed() -> None:
    """The chunk above the limit raises an error that names the limit and the setting."""
    with pytest.raises(TooLarge, match=rf"{len(DATA) - 1} bytes.*max_bytes"):
        list(limit(CHUNKS, len(DATA) - 1, "image"))


@pytest.mark.parametrize("data", [b"", b"small"])
def test_small_objects(primary: MemoryStore, data: bytes) -> None:
    """A small object is written and read in one call."""
    assert put_bytes(primary, "note", data, ME).size == len(data)
    assert read_bytes(primary, "note") == data


def test_small_object_too_large(primary: MemoryStore) -> None:
    """A read of a small object ends at its limit."""
    put_bytes(primary, "note", DATA, ME)
    with pytest.raises(TooLarge):
        read_bytes(primary, "note", max_bytes=100)


def test_failed_small_object(primary: MemoryStore) -> None:
    """A small object above the limit leaves nothing."""
    full = MemoryStore(capacity=3)
    with pytest.raises(WorkerError):
        put_bytes(full, "note", b"four", ME)
    assert is_empty(full)


# A slow second store


def test_slow_second_store(
    primary: MemoryStore, second: MemoryStore, sinks: dict[str, Sink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second store below the minimum rate, for which the stream waits, is reported as owed."""
    done = threading.Event()

    class Slow(Faulty):
        def write(self, chunk: bytes) -> None:
            done.wait(PATIENCE_S)
            self._sink.write(chunk)

    slow = Slow(sinks["second"], "", ValueError())
    monkeypatch.setattr("ssvm_worker.streaming.pipeline.SlowSinkDetector", partial(SlowSinkDetector, window_s=0.0))
    stored = store_stream(CHUNKS, {**sinks, "second": slow}, min_rate=1 << 60)
    done.set()
    assert (read_bytes(primary, "image"), list(stored.owed)) == (DATA, ["second"])
    assert "takes less than" in str(stored.owed["second"])
    assert is_empty(second)


@pytest.mark.parametrize(
    ("waited", "taken", "shown"),
    [
        pytest.param(20.0, 29, True, id="it holds up the stream"),
        pytest.param(20.0, 31, False, id="it is fast enough"),
        pytest.param(10.0, 29, False, id="the source is slow, or the first store"),
    ],
)
def test_slowness(waited: float, taken: int, shown: bool) -> None:
    """A store is too slow if it stays below the rate in a window with mostly waits for it."""
    slowness = SlowSinkDetector(1, window_s=30.0)
    now = slowness._since = 1000.0
    assert not slowness.is_too_slow(now + 29, 29.0, 0)
    assert slowness.is_too_slow(now + 30, waited, taken) is shown
    assert not slowness.is_too_slow(now + 59, 59.0, 0)
    assert not SlowSinkDetector(0).is_too_slow(now + 10**6, 10.0**6, 0)


def test_no_sinks() -> None:
    """A stream without a sink is a programming error, and starts no thread."""
    before = _threads_of_sinks()
    with pytest.raises(ValueError, match="without a sink"):
        store_stream(CHUNKS, {})
    assert _threads_of_sinks() == before


def test_no_more_threads(sinks: dict[str, Sink], monkeypatch: pytest.MonkeyPatch, primary: MemoryStore) -> None:
    """If a thread cannot start, the others end, nothing is left, and the job is tried again."""
    before, start = _threads_of_sinks(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "sink-second":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ResourceBusy, match="No thread"):
        store_stream(CHUNKS, sinks)
    assert _threads_of_sinks() == before
    assert is_empty(primary)


def _threads_of_sinks() -> set[threading.Thread]:
    """Return the threads that write to stores. Other tests of this process left threads that end at any time."""
    return {each for each in threading.enumerate() if each.name.startswith("sink-")}


def test_settled_before_the_commit(sinks: dict[str, Sink]) -> None:
    """A cancel takes effect while bytes are flushed to disk."""
    asked = threading.Event()

    class Settling(Faulty):
        def sync(self) -> int:
            asked.set()
            stop.wait(PATIENCE_S)
            return 0

    def check() -> None:
        if asked.is_set():
            raise Cancelled("user")

    stop = threading.Event()
    with pytest.raises(Cancelled):
        store_stream(CHUNKS, {"primary": Settling(sinks["primary"], "", ValueError())}, check=check)
    stop.set()
