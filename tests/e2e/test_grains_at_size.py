"""The grain store with a large disk."""

from __future__ import annotations

import pytest

from ssvm_worker.grain_store.reader import open_map
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.units import GiB
from tests.grain_bench import back_up_grains
from tests.images import GRAIN

pytestmark = pytest.mark.e2e


@pytest.mark.soak
def test_one_percent_of_a_gigabyte() -> None:
    """If 1 % of the grains of 1 GiB change, scattered, at most 1.5 % of the bytes are stored."""
    store, grains = MemoryStore(), {place: place for place in range(GiB // GRAIN)}
    back_up_grains(store, "b1", grains)
    first = store.usage().used or 0
    manifest = back_up_grains(store, "b2", grains | {place: -place - 1 for place in range(7, GiB // GRAIN, 100)})
    assert manifest.entries[0].facts["new_grains"] == 164
    assert (store.usage().used or 0) - first <= 0.015 * first
    assert len(list(open_map(store, manifest, manifest.entries[0]).runs())) <= 2 * 164 + 4
