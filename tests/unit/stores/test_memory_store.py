"""The memory store follows the store contract; this module tests its own features."""

from __future__ import annotations

import pytest

from ssvm_worker.errors import StoreFull
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import StoreUsage
from ssvm_worker.streaming.pipeline import put_bytes
from tests.contracts.resumable_store import ResumableStoreContract
from tests.contracts.store import BIG, ME, StoreContract, fill


class TestMemoryStore(ResumableStoreContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()


class TestMemoryStoreThatCannotResume(StoreContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore(resumable=False)


def test_capacity_is_checked_before_the_first_byte() -> None:
    """A size hint above the free space is refused at once."""
    store = MemoryStore(capacity=100)
    with pytest.raises(StoreFull):
        store.writer("a", 101, owner=ME)


def test_capacity_is_checked_on_the_way() -> None:
    """A stream of unknown length fails when it no longer fits, and leaves nothing."""
    store = MemoryStore(capacity=100)
    with pytest.raises(StoreFull), store.writer("a", owner=ME) as sink:
        fill(sink, BIG[:101])
    assert store.uncommitted() == set()


def test_usage_counts_objects() -> None:
    """Usage is the sum of the objects' sizes, and the rest of the capacity is free."""
    store = MemoryStore(capacity=100)
    put_bytes(store, "a", b"x" * 30, ME)
    assert store.usage() == StoreUsage(100, 30, 70)
