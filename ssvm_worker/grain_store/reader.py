"""Read a disk of an incremental backup as extents. The package ``formats`` builds images from extents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import attrgetter

from ssvm_worker.artifacts.manifest import Entry, Manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import Resuming
from ssvm_worker.units import KiB

from .map import ROLE, GrainMap
from .pack import REMEDY, Pack, PackIndex, digest, inflate, read_index

#: The number of grains to fetch together: 32 MiB of disk. One request fetches the adjacent grains of a pack.
_WINDOW = 512
#: The largest gap in bytes between two grains that one request fetches. The reader drops the bytes of the gap.
_MAX_GAP = 256 * KiB
#: The number of cached pack indexes. Each has 32 KiB. A window of a disk with many changes needs many indexes.
_INDEXES = 512

Wait = Callable[[float], None]


def extents(store: Store, manifest: Manifest, entry: Entry, wait: Wait = time.sleep) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of all parts of the disk that are not zeros, in ascending order, up to its capacity.

    *entry* is a grain map of the manifest. The function compares each grain with its digest. Holds 40 MiB.
    It retries failed reads, and calls *wait* between the tries.
    Raises, after some tries, StoreUnavailable and SourceUnavailable. Raises ObjectNotFound for a missing pack.
    Raises CorruptImage, which names the pack and the offset on the disk.
    """
    grain_map = open_map(store, manifest, entry)
    for offset, _, grain in _grains(grain_map, store, manifest.artifact.family, wait):
        yield offset, grain[: grain_map.capacity - offset]


def deflated(store: Store, manifest: Manifest, entry: Entry, wait: Wait = time.sleep) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, zlib stream) of each grain of the disk. The function compares each grain with its digest.

    The streams are those that the host sent. So the caller need not deflate the grains again.
    """
    grain_map = open_map(store, manifest, entry)
    for offset, data, _ in _grains(grain_map, store, manifest.artifact.family, wait):
        yield offset, data


def lengths(store: Store, manifest: Manifest, entry: Entry) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of each grain that ``deflated`` yields. Reads only map and indexes: 24 bytes a grain."""
    grain_map = open_map(store, manifest, entry)
    index_of = _cached_indexes(grain_map, store, manifest.artifact.family)
    for run in grain_map.runs():
        for step in range(run.grains):
            start, end = index_of(run.pack).span(run.first + step)
            yield (run.at + step) * grain_map.grain_size, end - start


def open_map(store: Store, manifest: Manifest, entry: Entry) -> GrainMap:
    """Open the grain map of a manifest's entry."""
    return GrainMap(store, manifest.artifact.key(entry.name))


def _cached_indexes(grain_map: GrainMap, store: Store, family: str) -> Callable[[int], PackIndex]:
    """Return a function that reads and caches the index of a pack by its number in the map."""
    return lru_cache(_INDEXES)(lambda number: read_index(store, family, grain_map.packs[number]))


def _grains(grain_map: GrainMap, store: Store, family: str, wait: Wait) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield offset, zlib stream and content of each grain, in ascending order."""
    index_of = _cached_indexes(grain_map, store, family)
    for window in _windows(grain_map):
        found: dict[int, bytes] = {}
        for number, places in groupby(sorted(window), attrgetter("pack")):
            found.update(_fetch(store, grain_map.packs[number].key(family), index_of(number), list(places), wait))
        for place in window:
            data = found.pop(place.at)
            offset, pack = place.at * grain_map.grain_size, grain_map.packs[place.pack].id
            location = f"{grain_map.location}, at byte {offset} of the disk: grain {place.number} of pack {pack}"
            grain = inflate(data, grain_map.grain_size, location)
            if digest(grain) != index_of(place.pack).digest(place.number):
                raise CorruptImage("A grain does not match its digest", location, REMEDY)
            yield offset, data, grain


@dataclass(frozen=True, order=True)
class _GrainPlace:
    """The place of one grain in a pack and on the disk."""

    pack: int
    number: int
    #: Offset on the disk, in grains.
    at: int


def _windows(grain_map: GrainMap) -> Iterator[list[_GrainPlace]]:
    window: list[_GrainPlace] = []
    for run in grain_map.runs():
        for step in range(run.grains):
            window.append(_GrainPlace(run.pack, run.first + step, run.at + step))
            if len(window) == _WINDOW:
                yield window
                window = []
    yield window


def _fetch(
    store: Store, key: str, index: PackIndex, places: list[_GrainPlace], wait: Wait
) -> Iterator[tuple[int, bytes]]:
    """Yield the grains at ascending places of one pack. One request fetches a group of close grains."""
    for group in _close_groups(index, places):
        start, end = index.span(group[0].number)[0], index.span(group[-1].number)[1]
        data = read_with_retries(store, key, start, end - start, wait)
        for place in group:
            first, last = index.span(place.number)
            yield place.at, data[first - start : last - start]


def _close_groups(index: PackIndex, places: Iterable[_GrainPlace]) -> Iterator[list[_GrainPlace]]:
    """Yield groups of grains with gaps of at most _MAX_GAP bytes."""
    group: list[_GrainPlace] = []
    for place in places:
        if group and index.span(place.number)[0] - index.span(group[-1].number)[1] > _MAX_GAP:
            yield group
            group = []
        group.append(place)
    yield group


def read_with_retries(store: Store, key: str, start: int, length: int, wait: Wait) -> bytes:
    """Return bytes of an object. After a broken connection, continue at the same offset."""
    found = bytearray()
    for chunk in Resuming(store.reader(key), wait, offset=start):
        found += chunk
        if len(found) >= length:
            return bytes(found[:length])
    raise CorruptImage("The pack is truncated", f"{store.name}:{key}", REMEDY)


def packs_of(store: Store, manifest: Manifest) -> dict[str, Pack]:
    """Return each pack of a backup by its key. A copy of the backup needs all these packs."""
    found: dict[str, Pack] = {}
    for entry in grain_maps(manifest):
        found |= {each.key(manifest.artifact.family): each for each in open_map(store, manifest, entry).packs}
    return found


def grain_maps(manifest: Manifest) -> list[Entry]:
    """Return the grain maps of a backup. A full backup has none."""
    return [each for each in manifest.entries if each.role == ROLE]
