"""The fault injectors really cause their faults on the memory store."""

from __future__ import annotations

import threading

import pytest

from ssvm_worker.errors import SourceUnavailable, StoreFull, StoreUnavailable
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import CHUNK, Store
from ssvm_worker.streaming.pipeline import Resuming, put_bytes, read_bytes
from tests import faults
from tests.contracts.store import BIG, ME, StoreContract, fill, get, keys, put
from tests.waiting import PATIENCE_S


class TestStoreWhoseFaultIsElsewhere(StoreContract):
    """A fault that concerns no key leaves the store contract intact."""

    @pytest.fixture
    def store(self) -> Store:
        return faults.store_failing(MemoryStore(resumable=False), after=0, chosen=lambda _: False)


def test_failing_store() -> None:
    """The store accepts what fits, then fails, and keeps nothing."""
    store = faults.store_failing(MemoryStore(), after=3 * CHUNK)
    put(store, "small", BIG[: 2 * CHUNK])
    with pytest.raises(StoreUnavailable):
        put(store, "large", BIG)
    assert keys(store) == ["small"]


def test_failing_so_many_times() -> None:
    """After the given number of failures, the store works."""
    store = faults.store_failing(MemoryStore(), after=0, times=1)
    with pytest.raises(StoreUnavailable):
        put(store, "a", BIG)
    put(store, "a", BIG)
    assert get(store, "a") == BIG


def test_full_store() -> None:
    """The store stays full."""
    with pytest.raises(StoreFull):
        put(faults.store_full(MemoryStore(), after=CHUNK), "a", BIG)


def test_failing_commit() -> None:
    """All bytes are accepted, but no object appears."""
    store = faults.store_failing_commit(MemoryStore())
    with pytest.raises(StoreUnavailable, match="commit"):
        put(store, "a", BIG)
    assert keys(store) == []


def test_corrupting_store() -> None:
    """One bit of an image is flipped, and small files beside it are unchanged."""
    at = CHUNK + 1
    store = faults.store_corrupting(MemoryStore(), at=at)
    put(store, "a.qcow2", BIG)
    put_bytes(store, "manifest.json", BIG[: 2 * CHUNK], ME)
    stored = get(store, "a.qcow2")
    assert (stored[at] ^ BIG[at]).bit_count() == 1
    assert (stored[:at], stored[at + 1 :]) == (BIG[:at], BIG[at + 1 :])
    assert read_bytes(store, "manifest.json") == BIG[: 2 * CHUNK]


def test_short_store() -> None:
    """The end of an object is lost without an error."""
    store = faults.store_short(MemoryStore(), after=CHUNK + 1)
    put(store, "a.qcow2", BIG)
    assert get(store, "a.qcow2") == BIG[: CHUNK + 1]


def test_stalling_store() -> None:
    """A write hangs until it is released, and then continues normally."""
    store, stall = faults.store_stalling(MemoryStore(), after=CHUNK)
    writer = threading.Thread(target=put, args=(store, "a.qcow2", BIG))
    writer.start()
    assert stall.reached.wait(PATIENCE_S)
    assert keys(store) == []
    stall.released.set()
    writer.join(PATIENCE_S)
    assert get(store, "a.qcow2") == BIG


def test_failing_source() -> None:
    """The source breaks in the stream so many times, and a resuming reader gets the bytes once."""
    store = MemoryStore()
    put(store, "a", BIG)
    source = faults.source_failing(store.reader("a"), after=CHUNK + 5, times=2)
    with pytest.raises(SourceUnavailable):
        list(source.open())
    assert b"".join(Resuming(source, lambda _: None)) == BIG
    assert source.opened == [0, 0, CHUNK + 5]


def test_spoiled_sink_is_left_like_any_other() -> None:
    """The end of a wrapped sink aborts the sink inside."""
    store = MemoryStore()
    with faults.store_short(store, after=0).writer("a", owner=ME) as sink:
        fill(sink, BIG)
    assert (keys(store), store.uncommitted()) == ([], set())
