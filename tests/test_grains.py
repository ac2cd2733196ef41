"""The grain store: every backup restores alone, and stores only what its volume did not have."""

from __future__ import annotations

from ssvm_worker.stores.memory import MemoryStore
from tests.grain_bench import back_up, changed, disk, restored
from tests.images import GRAIN


def test_chain() -> None:
    """Each of several backups of a disk that changes gives back the disk as it was then."""
    store = MemoryStore()
    raws = [disk(90)]
    for step in range(4):
        raws.append(changed(raws[-1], step, 40 + step, 77, seed=step))
    manifests = [back_up(store, f"b{number}", raw) for number, raw in enumerate(raws)]
    assert [restored(store, each) for each in manifests] == raws
    assert [each.entries[0].facts["new_grains"] for each in manifests] == [60, 3, 3, 3, 3]


def test_odd_end() -> None:
    """A disk that does not end with a whole grain comes back with just its bytes."""
    store = MemoryStore()
    raw = disk(5, zeros=9)[: -GRAIN + 1536]
    assert restored(store, back_up(store, "b1", raw)) == raw
