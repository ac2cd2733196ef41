"""The deletion and verification of incremental backups never damage another backup."""

from __future__ import annotations

import re
from itertools import permutations
from typing import Any

import pytest

from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.errors import Cancelled
from ssvm_worker.grain_store.pack import find_index
from ssvm_worker.grain_store.reader import packs_of
from ssvm_worker.jobs.backup.incremental import verify_packs
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import put_bytes
from tests.attempts import attempt
from tests.grain_bench import OWNER, back_up, changed, disk, packs, restored

RAWS = {"b1": disk(24), "b2": changed(disk(24), 3, 7), "b3": changed(disk(24), 7, 9, 12)}
NAMES = {"kind": "backup", "account": "acme", "volume": "vol1"}


@pytest.fixture
def store() -> MemoryStore:
    """Return a store with three backups of one volume."""
    store = MemoryStore("primary")
    for id_, raw in RAWS.items():
        back_up(store, id_, raw)
    return store


def drop(store: MemoryStore, id_: str, **how: Any) -> dict[str, Any]:
    return delete.run(delete.Request(id=id_, **NAMES), attempt(store, **how))  # type: ignore[arg-type]


def look(store: MemoryStore, id_: str) -> str:
    """Return the findings about the packs of that backup."""
    manifest = find_manifest(store, delete.Request(id=id_, **NAMES).artifact)  # type: ignore[arg-type]
    assert manifest
    return "; ".join(verify_packs(store, manifest, lambda _: None, lambda _: None, set()))


def there(store: MemoryStore) -> dict[str, bytes]:
    """Return the restored content of each existing backup."""
    request = {id_: delete.Request(id=id_, **NAMES).artifact for id_ in RAWS}  # type: ignore[arg-type]
    found = {id_: find_manifest(store, artifact) for id_, artifact in request.items()}
    return {id_: restored(store, manifest) for id_, manifest in found.items() if manifest}


@pytest.mark.parametrize("order", list(permutations(RAWS)), ids=" ".join)
def test_any_order(store: MemoryStore, order: tuple[str, ...]) -> None:
    """Backups are deleted in any order, the rest stay restorable, and finally nothing is left."""
    left = dict(RAWS)
    for id_ in order:
        drop(store, id_)
        del left[id_]
        assert there(store) == left
    assert not list(store.list())


def test_freed(store: MemoryStore) -> None:
    """Only packs that no other backup needs are deleted, and the result has their number."""
    before = set(packs(store))
    result = drop(store, "b2")
    assert result["packs"]["primary"]["deleted"] == len(before - set(packs(store))) == 1


class _Killed(BaseException):
    """An error that no clean-up catches."""


class _Deadly:
    """A store that raises at its nth deletion."""

    def __init__(self, inner: MemoryStore, deletions: int) -> None:
        self._inner = inner
        self._left = deletions
        self.name = inner.name

    def delete(self, key: str) -> None:
        if not self._left:
            raise _Killed
        self._left -= 1
        self._inner.delete(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("deletions", range(4))
def test_killed(store: MemoryStore, deletions: int) -> None:
    """A deletion that is killed at any point damages no other backup, and the next one finishes it."""
    deadly: Any = _Deadly(store, deletions)
    drop(store, "b1")
    with pytest.raises(_Killed):
        drop(deadly, "b2")
    assert all(raw == RAWS[id_] for id_, raw in there(store).items())
    for id_ in ("b1", "b2"):
        drop(store, id_)
    assert there(store) == {"b3": RAWS["b3"]}
    drop(store, "b3")
    assert not list(store.list())


def test_fenced(store: MemoryStore) -> None:
    """A sweep without its lock deletes no pack."""
    before = packs(store)
    calls = iter([None])

    def confirm() -> None:
        if next(calls, "fenced"):
            raise Cancelled("fenced")

    with pytest.raises(Cancelled):
        drop(store, "b2", confirm=confirm)
    assert packs(store) == before


@pytest.mark.parametrize("spoil", ["damaged", "missing"])
def test_map_lost(store: MemoryStore, spoil: str) -> None:
    """While a map cannot be read, no pack counts as unused, and the result gives the reason."""
    key, before = "snapshots/acme/vol1/b3/b3-disk0.grains", packs(store)
    if spoil == "missing":
        store.delete(key)
    else:
        put_bytes(store, key, b"no map", OWNER)
    result = drop(store, "b2")
    assert key in str(result["packs"]["primary"]["kept"])
    assert packs(store) == before


def test_unfinished_backup(store: MemoryStore) -> None:
    """The packs of an unfinished backup are kept, because its job continues from its maps."""
    store.delete("snapshots/acme/vol1/b2/manifest.json")
    drop(store, "b1")
    drop(store, "b3")
    assert len(packs(store)) == 2


def test_whole(store: MemoryStore) -> None:
    """Verification finds complete backups complete."""
    for id_ in RAWS:
        assert not look(store, id_)


DAMAGE = {
    "a flipped bit in a grain": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "another beginning": lambda data: b"X" + data[1:],
    "a flipped bit in the index": lambda data: data[:-90] + bytes([data[-90] ^ 1]) + data[-89:],
    "an end cut off": lambda data: data[:-1],
    "nothing left": lambda data: b"",
}


@pytest.mark.parametrize("spoilt", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage(store: MemoryStore, spoilt: Any) -> None:
    """Each backup that needs a damaged pack reports the damage and names the pack."""
    key = _pack_of(store, "b1")
    put_bytes(store, key, spoilt(store.find(key).data), OWNER)
    for id_ in RAWS:
        assert key in look(store, id_)


def test_missing_pack(store: MemoryStore) -> None:
    """A missing pack is reported with all backups that need it."""
    key = _pack_of(store, "b1")
    store.delete(key)
    assert re.search(f"{key}.*b1-disk0.*b2-disk0.*b3-disk0", look(store, "b2"))


def test_named_places(store: MemoryStore) -> None:
    """The backups with a damaged grain are named with its LBA, and no backups with another grain there."""
    key = _pack_of(store, "b1")
    data = bytearray(store.find(key).data)
    _, index = find_index(store, key, len(data))
    data[index.span(5)[0] + 30] ^= 1  # grain 5 of the pack is grain 7 of the disk, because every third is empty
    put_bytes(store, key, bytes(data), OWNER)
    said = look(store, "b1")
    assert "b1-disk0.grains lacks LBA 896-1023" in said
    assert "b2-disk0" not in said


def _pack_of(store: MemoryStore, id_: str) -> str:
    """Return the first pack of a backup."""
    manifest = find_manifest(store, delete.Request(id=id_, **NAMES).artifact)  # type: ignore[arg-type]
    assert manifest
    return next(iter(packs_of(store, manifest)))
