"""A sink that spills to a file: the store gets every byte in order, and the stream does not wait for it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ssvm_worker.errors import Cancelled, StoreUnavailable
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.disk_buffer import DiskBuffer
from ssvm_worker.streaming.interfaces import CHUNK, Owner, Sink, Store
from ssvm_worker.streaming.pipeline import QUEUE_SIZE, read_bytes, store_stream
from ssvm_worker.units import KiB
from tests.faults import Stall, store_failing, store_stalling
from tests.waiting import PATIENCE_S

CHUNKS = [os.urandom(64 * KiB) for _ in range(40)]
ROOM = 20 * 64 * KiB
#: The number of these chunks that wait in memory.
DEPTH = QUEUE_SIZE // CHUNK


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spill to the file as soon as memory is full."""
    monkeypatch.setattr("ssvm_worker.streaming.disk_buffer.HOLD_S", 0.0)


def spill(store: Store, directory: Path, *, patient: bool = True, limit: int = ROOM) -> DiskBuffer:
    """Return a spilling sink of that store."""
    return DiskBuffer(store.writer("x", owner=Owner()), directory, limit, patient=patient)


def write_all(sink: DiskBuffer, chunks: list[bytes]) -> DiskBuffer:
    """Write all chunks, and return the sink."""
    for chunk in chunks:
        sink.write(chunk)
    return sink


def stalled(directory: Path, **how: bool) -> tuple[MemoryStore, DiskBuffer, Stall]:
    """Return a store that hangs at its first chunk, and its sink."""
    store = MemoryStore()
    slow, stall = store_stalling(store, after=0)
    return store, spill(slow, directory, **how), stall


@pytest.mark.parametrize("count", [0, 1, DEPTH, 25, 40])
def test_in_order(tmp_path: Path, count: int) -> None:
    """Spilled chunks reach the store completely and in order, however often the file wraps around."""
    store, sink, stall = stalled(tmp_path)
    with sink:
        for number, chunk in enumerate(CHUNKS[:count]):
            if number == 25:
                stall.released.set()
            sink.write(chunk)
        stall.released.set()
        assert sink.commit().size == count * 64 * KiB
    assert read_bytes(store, "x") == b"".join(CHUNKS[:count])


def test_does_not_wait(tmp_path: Path) -> None:
    """A stream continues while the store hangs, until memory and file are full."""
    _, sink, stall = stalled(tmp_path)
    with sink:
        sink.write(CHUNKS[0])
        assert stall.reached.wait(PATIENCE_S)
        for chunk in CHUNKS[1 : 1 + DEPTH + 20]:
            sink.write(chunk)
        assert sink.spilled == ROOM
        stall.released.set()


def test_nothing_on_disk(tmp_path: Path) -> None:
    """The file has no name, so a killed worker leaves nothing."""
    _, sink, stall = stalled(tmp_path)
    with sink:
        for chunk in CHUNKS[:20]:
            sink.write(chunk)
        assert sink.spilled
        assert not list(tmp_path.iterdir())
        stall.released.set()


def test_full(tmp_path: Path) -> None:
    """If the file is full, an impatient sink fails with an error that names the slow store."""
    _, sink, stall = stalled(tmp_path, patient=False)
    with sink:
        with pytest.raises(StoreUnavailable, match="too slow"):
            write_all(sink, CHUNKS)
        stall.released.set()


def test_patient(tmp_path: Path) -> None:
    """If the file is full, a patient sink makes the stream wait, and no byte is lost."""
    store, sink, stall = stalled(tmp_path)
    with sink:
        writer = threading.Thread(target=write_all, args=(sink, CHUNKS))
        writer.start()
        while sink.spilled < ROOM:
            assert writer.is_alive()
        stall.released.set()
        writer.join(PATIENCE_S)
        sink.commit()
    assert read_bytes(store, "x") == b"".join(CHUNKS)


@pytest.mark.parametrize("directory", ["a file", "/proc/nowhere"])
def test_no_room_on_the_worker(tmp_path: Path, directory: str) -> None:
    """If the file cannot be written, the sink works without it."""
    (tmp_path / "a file").write_bytes(b"")
    store = MemoryStore()
    slow, stall = store_stalling(store, after=0)
    sink = spill(slow, tmp_path / directory)
    with sink:
        writer = threading.Thread(target=write_all, args=(sink, CHUNKS))
        writer.start()
        assert stall.reached.wait(PATIENCE_S)
        stall.released.set()
        writer.join(PATIENCE_S)
        sink.commit()
    assert (read_bytes(store, "x"), sink.spilled) == (b"".join(CHUNKS), 0)


def test_store_fails(tmp_path: Path) -> None:
    """The store's error is raised by a write or by the commit, and no object is stored."""
    store = MemoryStore()
    with spill(store_failing(store, after=200 * KiB), tmp_path) as sink:  # noqa: SIM117 - the sink must be left too
        with pytest.raises(StoreUnavailable, match="by request"):
            write_all(sink, CHUNKS[:5]).commit()
    assert not list(store.list())


def test_given_up_while_stuck(tmp_path: Path) -> None:
    """A cancelled stream ends while its store hangs, and leaves nothing when the store returns."""
    store, sink, stall = stalled(tmp_path)

    def check() -> None:
        if sink.spilled:
            raise Cancelled("user")

    sinks: dict[str, Sink] = {"a": sink}
    with pytest.raises(Cancelled):
        store_stream(CHUNKS, sinks, check=check)
    stall.released.set()
    sink.abort()
    assert not list(store.list())


def test_owed(tmp_path: Path) -> None:
    """A secondary store that stays too slow is reported as owed, and the primary is complete."""
    primary = MemoryStore("primary")
    _, slow, stall = stalled(tmp_path, patient=False)
    with slow, primary.writer("x", owner=Owner()) as sink:
        stored = store_stream(CHUNKS, {"primary": sink, "slow": slow})
        stall.released.set()
    assert list(stored.owed) == ["slow"]
    assert read_bytes(primary, "x") == b"".join(CHUNKS)


def test_after_a_commit(tmp_path: Path) -> None:
    """Closing or aborting a committed sink has no effect."""
    store = MemoryStore()
    with spill(store, tmp_path) as sink:
        sink.write(CHUNKS[0])
        sink.commit()
        sink.abort()
    assert read_bytes(store, "x") == CHUNKS[0]


def test_a_store_that_is_only_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is slow but takes chunks delays the stream, and the file is not used."""
    monkeypatch.setattr("ssvm_worker.streaming.disk_buffer.HOLD_S", 60.0)
    store, sink, stall = stalled(tmp_path)
    writer = threading.Thread(target=write_all, args=(sink, CHUNKS))
    writer.start()
    writer.join(0.1)
    assert writer.is_alive()
    stall.released.set()
    writer.join(PATIENCE_S)
    sink.commit()
    assert sink.spilled == 0
    assert read_bytes(store, "x") == b"".join(CHUNKS)
