"""Disks that change. The grain store stores them as a backup job does, without a vCenter."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import PACKS, Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.grain_store.index import Index, list_packs
from ssvm_worker.grain_store.map import ROLE
from ssvm_worker.grain_store.reader import extents
from ssvm_worker.grain_store.sink import GrainSink
from ssvm_worker.grain_store.writer import DiskPacker
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import read_bytes, store_stream
from tests.images import GRAIN, MARKER_EOS, SECTOR, padded, stream_optimized, vmdk_grain, vmdk_header, vmdk_marker

OWNER = Owner("job-1", 1)


def disk(grains: int, seed: int = 1, zeros: int = 3) -> bytearray:
    """Return a disk of so many grains, half noise and half text. One of *zeros* grains is empty."""
    made = random.Random(seed)
    half = GRAIN // 2
    data = bytearray()
    for number in range(grains):
        data += bytes(GRAIN) if number % zeros == zeros - 1 else made.randbytes(half) + bytes([number % 251]) * half
    return data


def changed(raw: bytes, *places: int, seed: int = 2) -> bytearray:
    """Return a copy of a disk with other content in the grains at those places."""
    made, copy = random.Random(seed), bytearray(raw)
    for place in places:
        copy[place * GRAIN : place * GRAIN + 4096] = made.randbytes(4096)
    return copy


def back_up(stores: Sequence[Store] | Store, id_: str, *raws: bytes, volume: str = "vol1", **given: Any) -> Manifest:
    """Store disks as an incremental backup, and return its manifest. *given* is for ``store_stream``."""
    streams = [(stream_optimized(bytes(raw)), len(raw)) for raw in raws]
    return _back_up(stores, id_, streams, volume, **given)


def back_up_grains(store: Store, id_: str, numbers: Mapping[int, int]) -> Manifest:
    """Do the same for disks whose grains each repeat a number. This is fast, because it compresses well."""
    capacity = len(numbers) * GRAIN
    pieces = [padded(vmdk_header(capacity=capacity // SECTOR), GRAIN)]
    for place, number in numbers.items():
        pieces.append(vmdk_grain(place * GRAIN // SECTOR, number.to_bytes(8, "big", signed=True) * (GRAIN // 8)))
    return _back_up(store, id_, [(b"".join([*pieces, vmdk_marker(0, MARKER_EOS)]), capacity)], "vol1")


def _back_up(
    stores: Sequence[Store] | Store, id_: str, disks: list[tuple[bytes, int]], volume: str, **given: Any
) -> Manifest:
    stores = stores if isinstance(stores, list) else [stores]
    artifact = Artifact("backup", "acme", id_, volume)
    manifest = Manifest(artifact, "job-1", facts={"mode": "incremental"})
    with Index() as index:
        for number, disk in enumerate(disks):
            index.sync(stores[0], [list_packs(each, artifact.family) for each in stores])
            manifest = manifest.with_entry(_disk(stores, artifact, f"{id_}-disk{number}.grains", disk, index, **given))
    for store in stores:
        write_manifest(store, manifest, OWNER)
    return manifest


def _disk(
    stores: Sequence[Store], artifact: Artifact, name: str, disk: tuple[bytes, int], index: Index, **given: Any
) -> Entry:
    stream, capacity = disk
    chunks = [stream[at : at + 100_000] for at in range(0, len(stream), 100_000)]
    with DiskPacker(index, capacity, name, name) as packing:
        walker = StreamOptimized(name, capacity, take=packing.take)
        key = artifact.key(name)
        sinks = {each.name: GrainSink(each, artifact.family, key, packing, OWNER) for each in stores}
        given.setdefault("verify", walker.finish)
        store_stream(packing.stream(chunks, lambda: None, walker), sinks, **given)
        packing.mark_stored()
        facts = {
            "new_grains": sum(each.grains for each in packing.new_packs()),
            "new_bytes": sum(each.size for each in packing.new_packs()),
            "grains": packing.grains,
        }
    data = read_bytes(stores[0], key)
    return Entry(name, len(data), str(digest_of(data)), ROLE, facts | {"virtual_size": capacity})


def packs(store: Store, volume: str = "vol1") -> list[str]:
    """Return the keys of the packs of a volume."""
    return [each.key for each in store.list(f"snapshots/acme/{volume}/{PACKS}")]


def restored(store: Store, manifest: Manifest, number: int = 0) -> bytes:
    """Return the disk from its extents, with zeros between them."""
    entry = manifest.entries[number]
    raw = bytearray(entry.facts["virtual_size"])
    for offset, data in extents(store, manifest, entry):
        raw[offset : offset + len(data)] = data
    return bytes(raw)
