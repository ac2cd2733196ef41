"""The grain store: every backup restores alone, and stores only grains that its volume lacks."""

from __future__ import annotations

import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.errors import CorruptImage, InvalidRequest, StoreUnavailable
from ssvm_worker.formats.writers.vmdk import stream_optimized
from ssvm_worker.grain_store.index import Index
from ssvm_worker.grain_store.reader import extents
from ssvm_worker.stores import open_store
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import put_bytes
from tests.faults import store_failing, store_failing_commit
from tests.grain_bench import OWNER, back_up, back_up_grains, changed, disk, packs, restored
from tests.images import GRAIN
from tests.neighbours import missing
from tests.servers.s3 import S3Server


def test_chain() -> None:
    """Each backup of a changing disk restores the disk as it was then."""
    store = MemoryStore()
    raws = [disk(90)]
    for step in range(4):
        raws.append(changed(raws[-1], step, 40 + step, 77, seed=step))
    manifests = [back_up(store, f"b{number}", raw) for number, raw in enumerate(raws)]
    assert [restored(store, each) for each in manifests] == raws
    assert [each.entries[0].facts["new_grains"] for each in manifests] == [60, 3, 3, 3, 3]


def test_qemu(tmp_path: Path) -> None:
    """qemu-img finds the restored image of an incremental backup identical to the disk."""
    if shutil.which("qemu-img") is None:
        missing("qemu-img", "apt-get install qemu-utils")
    store, raw = MemoryStore(), disk(40)
    back_up(store, "b1", raw)
    raw = changed(raw, 3, 20, 38)
    manifest = back_up(store, "b2", raw)
    image, original = tmp_path / "restored.vmdk", tmp_path / "original.raw"
    image.write_bytes(b"".join(stream_optimized(extents(store, manifest, manifest.entries[0]), len(raw), "x.vmdk")))
    original.write_bytes(raw)
    command = ["qemu-img", "compare", "-f", "vmdk", "-F", "raw", str(image), str(original)]
    assert "identical" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_file_store(tmp_path: Path) -> None:
    """A chain of backups in a directory restores each of its disks."""
    _in(FileStore("file", tmp_path))


def test_s3_store(s3_server: S3Server, s3_bucket: str) -> None:
    """A chain of backups in S3 restores each of its disks."""
    keys = {"access_key": S3Server.access_key, "secret_key": S3Server.secret_key}
    _in(open_store("s3", f"s3://{s3_bucket}", endpoint=s3_server.endpoint, **keys))


def _in(store: Store) -> None:
    raws = [disk(20), changed(disk(20), 4)]
    manifests = [back_up(store, f"b{number}", raw) for number, raw in enumerate(raws)]
    assert [restored(store, each) for each in manifests] == raws


@pytest.mark.parametrize("end", [512, 1536, GRAIN - 512])
def test_odd_end(end: int) -> None:
    """A disk that ends inside a grain is restored with exactly its bytes."""
    store = MemoryStore()
    raw = disk(5, zeros=9)[: 4 * GRAIN + end]
    assert restored(store, back_up(store, "b1", raw)) == raw


def test_empty_disk() -> None:
    """A disk of zeros needs no pack."""
    store = MemoryStore()
    raw = bytes(10 * GRAIN)
    assert restored(store, back_up(store, "b1", raw)) == raw
    assert not packs(store)


def test_one_percent() -> None:
    """If 1 % of the grains change, a backup stores at most 1.5 % of the bytes, including maps."""
    store, grains = MemoryStore(), {place: place for place in range(2000)}
    back_up_grains(store, "b1", grains)
    first = store.usage().used or 0
    manifest = back_up_grains(store, "b2", grains | {place: -place - 1 for place in range(7, 2000, 100)})
    assert manifest.entries[0].facts["new_grains"] == 20
    assert (store.usage().used or 0) - first <= 0.015 * first


def test_moved() -> None:
    """Content that moves on the disk, or occurs twice, is stored once."""
    store, raw = MemoryStore(), disk(10, zeros=99)
    back_up(store, "b1", raw)
    moved = raw[5 * GRAIN :] + raw[: 5 * GRAIN] + raw
    manifest = back_up(store, "b2", moved)
    assert manifest.entries[0].facts["new_grains"] == 0
    assert restored(store, manifest) == moved


def test_two_disks() -> None:
    """The disks of one backup share grains too."""
    store, raw = MemoryStore(), disk(12)
    manifest = back_up(store, "b1", raw, changed(raw, 1))
    assert [each.facts["new_grains"] for each in manifest.entries] == [8, 1]
    assert restored(store, manifest, 1) == changed(raw, 1)


def test_two_volumes() -> None:
    """Volumes share no grains, so each can be deleted or read without the others."""
    store, raw = MemoryStore(), disk(12)
    for volume in ("vol1", "vol2"):
        assert back_up(store, "b1", raw, volume=volume).entries[0].facts["new_grains"] == 8
    for each in list(store.list("snapshots/acme/vol1")):
        store.delete(each.key)
    assert restored(store, back_up(store, "b2", raw, volume="vol2")) == raw


def test_second_store() -> None:
    """A new store, or one that missed a backup, becomes complete with the next backup."""
    first, second = MemoryStore("first"), MemoryStore("second")
    raw = disk(20)
    back_up(first, "b1", raw)
    manifest = back_up([first, second], "b2", changed(raw, 3))
    assert restored(second, manifest) == restored(first, manifest) == changed(raw, 3)


def test_second_store_fails() -> None:
    """A failing second store does not affect the first, and the next backup completes it."""
    first, second = MemoryStore("first"), MemoryStore("second")
    raw = disk(30)
    back_up([first, store_failing(second, 300_000)], "b1", raw)
    manifest = back_up([first, second], "b2", raw)
    assert restored(second, manifest) == restored(first, manifest) == raw


@pytest.mark.parametrize("after", [0, 50_000, 700_000])
def test_killed(after: int) -> None:
    """A failure at any point leaves no map, and the next attempt does not store complete packs again."""
    store, raw = MemoryStore(), disk(60)
    with pytest.raises(StoreUnavailable):
        back_up(store_failing(store, after), "b1", raw)
    assert not [each for each in store.list() if each.key.endswith((".grains", ".json"))]
    assert not store.uncommitted()
    assert restored(store, back_up(store, "b1", raw)) == raw


def test_map_fails() -> None:
    """If the map cannot be stored, the next attempt stores no pack again, and the packs count as new."""
    store, raw = MemoryStore(), disk(30)
    with pytest.raises(StoreUnavailable):
        back_up(store_failing_commit(store, chosen=lambda key: key.endswith(".grains")), "b1", raw)
    stored = packs(store)
    manifest = back_up(store, "b1", raw)
    assert packs(store) == stored
    assert manifest.entries[0].facts["new_grains"] == 20
    assert restored(store, manifest) == raw


def test_pack_gone_meanwhile() -> None:
    """A backup does not rely on a pack that disappeared while the backup was made."""
    store, raw = MemoryStore(), disk(12)
    back_up(store, "b1", raw)

    def lose() -> None:
        for key in packs(store):
            store.delete(key)

    with pytest.raises(StoreUnavailable, match="missing"):
        back_up(store, "b2", raw, verify=lose)


def test_index_damaged() -> None:
    """A pack with an unreadable index is not used, and its grains are stored again."""
    store, raw = MemoryStore(), disk(12)
    back_up(store, "b1", raw)
    (key,) = packs(store)
    data = bytearray(store.find(key).data)
    data[-50] ^= 1
    put_bytes(store, key, bytes(data), OWNER)
    manifest = back_up(store, "b2", raw)
    assert manifest.entries[0].facts["new_grains"] == 8
    assert restored(store, manifest) == raw


def test_index_size() -> None:
    """The index uses at most 64 bytes per grain on disk, and its memory use is constant."""
    with Index() as index:
        mark = object()
        number = index.begin_pack("0" * 32, mark)
        for each in range(20_000):
            index.add(number, each % 16384, zlib.crc32(each.to_bytes(4, "big")).to_bytes(4, "big") * 5)
        assert index.size / len(index) <= 64


def test_reserved_id() -> None:
    """No backup may have the name of the directory of the packs."""
    with pytest.raises(InvalidRequest):
        _ = Artifact("backup", "acme", "_packs", "vol1").prefix


MAPS = {
    "cut in its head": lambda data: data[:30],
    "cut in its list of packs": lambda data: data[:60],
    "cut in its runs": lambda data: data[:-5],
    "with a longer disk": lambda data: data[:16] + b"\xff" + data[17:],
    "with other packs": lambda data: data[:50] + b"\xff" + data[51:],
    "with other runs": lambda data: data[:-6] + bytes([data[-6] ^ 255]) + data[-5:],
    "with something behind it": lambda data: data + b"x",
    "of another kind": lambda data: b"SSVMPACK" + data[8:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("spoil", MAPS.values(), ids=MAPS.keys())
def test_bad_map(spoil: object) -> None:
    """A damaged grain map is reported as damage, and is never read as another disk."""
    store, raw = MemoryStore(), disk(12)
    manifest = back_up(store, "b1", raw)
    key = manifest.artifact.key("b1-disk0.grains")
    put_bytes(store, key, spoil(store.find(key).data), OWNER)  # type: ignore[operator]
    with pytest.raises(CorruptImage):
        restored(store, manifest)
