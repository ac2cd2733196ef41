"""Differences between two backups by their grain maps, and whether change tracking reported them."""

from __future__ import annotations

import pytest

from ssvm_worker.grain_store.compare import differing, outside
from ssvm_worker.grain_store.reader import open_map
from ssvm_worker.stores.memory import MemoryStore
from tests.grain_bench import back_up, back_up_grains, changed, disk
from tests.images import GRAIN

RAW = disk(30)


def differences(one: bytes, other: bytes) -> list[int]:
    """Return the grains that differ between two backups of one volume."""
    store = MemoryStore()
    maps = [open_map(store, each, each.entries[0]) for each in (back_up(store, "b1", one), back_up(store, "b2", other))]
    return [offset // GRAIN for offset, _ in differing(store, "snapshots/acme/vol1", *maps)]


def swapped(raw: bytes, one: int, other: int) -> bytes:
    """Return a disk with two grains exchanged."""
    grains = [raw[at : at + GRAIN] for at in range(0, len(raw), GRAIN)]
    grains[one], grains[other] = grains[other], grains[one]
    return b"".join(grains)


CASES: dict[str, tuple[bytes, list[int]]] = {
    "the same disk": (bytes(RAW), []),
    "one grain in the middle": (bytes(changed(RAW, 10)), [10]),
    "the first and the last": (bytes(changed(RAW, 0, 28)), [0, 28]),
    "a grain where there were zeros": (bytes(changed(RAW, 5)), [5]),
    "zeros where there was a grain": (bytes(RAW[: 4 * GRAIN] + bytes(GRAIN) + RAW[5 * GRAIN :]), [4]),
    "two grains in each other's place": (swapped(RAW, 3, 12), [3, 12]),
    "nothing left": (bytes(len(RAW)), [place for place in range(30) if place % 3 != 2]),
}


@pytest.mark.parametrize(("other", "expected"), CASES.values(), ids=CASES.keys())
def test_differing(other: bytes, expected: list[int]) -> None:
    """Exactly the grains with other bytes differ, in either order of comparison."""
    assert differences(RAW, other) == differences(other, RAW) == expected


def test_same_content_stored_twice() -> None:
    """Equal grains in two packs do not differ."""
    first, second = MemoryStore("first"), MemoryStore("second")
    manifests = back_up(first, "b1", RAW), back_up([first, second], "b2", RAW)
    maps = [open_map(first, each, each.entries[0]) for each in manifests]
    assert maps[0].packs != maps[1].packs
    assert not list(differing(first, "snapshots/acme/vol1", *maps))


@pytest.mark.parametrize(("other", "expected"), [(bytes(2 * GRAIN), []), (bytes(GRAIN) + b"a" * GRAIN, [1])])
def test_grain_of_zeros(other: bytes, expected: list[int]) -> None:
    """A grain of zeros equals a missing grain, and differs from a grain of data."""
    store = MemoryStore()
    backups = back_up_grains(store, "b1", {0: 0, 1: 0}), back_up(store, "b2", other)
    maps = [open_map(store, each, each.entries[0]) for each in backups]
    assert [offset // GRAIN for offset, _ in differing(store, "snapshots/acme/vol1", *maps)] == expected


OUTSIDE: dict[str, tuple[list[int], list[tuple[int, int]], list[int]]] = {
    "nothing changed": ([], [(0, 100)], []),
    "no area at all": ([0, 3], [], [0, 3]),
    "just in it": ([2], [(2 * GRAIN, GRAIN)], []),
    "a sector of it": ([2], [(2 * GRAIN + 512, 512)], []),
    "behind and before": ([1, 3], [(2 * GRAIN, GRAIN)], [1, 3]),
    "areas that overlap": ([1, 4, 6], [(0, 5 * GRAIN), (GRAIN, 512), (4 * GRAIN, GRAIN)], [6]),
}


@pytest.mark.parametrize(("grains", "areas", "expected"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_outside(grains: list[int], areas: list[tuple[int, int]], expected: list[int]) -> None:
    """A grain is outside if no area overlaps it."""
    found = outside(iter([(place * GRAIN, GRAIN) for place in grains]), areas)
    assert [offset // GRAIN for offset, _ in found] == expected
