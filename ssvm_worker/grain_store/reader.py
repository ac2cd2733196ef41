"""Gives a disk of an incremental backup back, as extents; ``formats`` makes any image of them."""

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

from .grain import REMEDY, digest, inflate
from .map import ROLE, GrainMap
from .pack import Pack, PackIndex, read_index

#: Grains that are fetched together: 32 MiB of disk. Those of one pack come in one request.
_WINDOW = 512
#: Bytes between two grains of a pack that are read along rather than asked for apart.
_GAP = 256 * KiB
#: Indexes of packs that are kept: 32 KiB each, and a window of a much changed disk may need many.
_INDEXES = 512

Wait = Callable[[float], None]


def extents(store: Store, manifest: Manifest, entry: Entry, wait: Wait = time.sleep) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of all of the disk that is not zeros, in rising order, none beyond its capacity.

    *entry* is a grain map of the manifest. Every grain is compared with its digest. Holds 40 MiB.
    Raises CorruptImage, which names the pack and the place on the disk, ObjectNotFound for a pack that is missing,
    StoreUnavailable and SourceUnavailable after some tries; *wait* is called between them.
    """
    it = open_map(store, manifest, entry)
    for offset, _, grain in _grains(it, store, manifest.artifact.family, wait):
        yield offset, grain[: it.capacity - offset]


def deflated(store: Store, manifest: Manifest, entry: Entry, wait: Wait = time.sleep) -> Iterator[tuple[int, bytes]]:
    """The same grains, compared as well, but as zlib streams: what a host has sent need not be deflated again."""
    it = open_map(store, manifest, entry)
    for offset, data, _ in _grains(it, store, manifest.artifact.family, wait):
        yield offset, data


def lengths(store: Store, manifest: Manifest, entry: Entry) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each grain that ``deflated`` will yield; reads map and indexes only: 24 bytes a grain."""
    it = open_map(store, manifest, entry)
    index_of = _indexes(it, store, manifest.artifact.family)
    for run in it.runs():
        for step in range(run.grains):
            start, end = index_of(run.pack).span(run.first + step)
            yield (run.at + step) * it.grain_size, end - start


def open_map(store: Store, manifest: Manifest, entry: Entry) -> GrainMap:
    """The grain map that an entry lists: its capacity (bytes), packs and runs."""
    return GrainMap(store, manifest.artifact.key(entry.name))


def _indexes(it: GrainMap, store: Store, family: str) -> Callable[[int], PackIndex]:
    """The index of each of the map's packs by its number, read when it is first wanted."""
    return lru_cache(_INDEXES)(lambda number: read_index(store, family, it.packs[number]))


def _grains(it: GrainMap, store: Store, family: str, wait: Wait) -> Iterator[tuple[int, bytes, bytes]]:
    """Offset, zlib stream and content of each grain, in rising order."""
    index_of = _indexes(it, store, family)
    for window in _windows(it):
        found: dict[int, bytes] = {}
        for number, places in groupby(sorted(window), attrgetter("pack")):
            found.update(_fetch(store, it.packs[number].key(family), index_of(number), list(places), wait))
        for place in window:
            data = found.pop(place.at)
            grain = _inflated(it, place, data, index_of(place.pack).digest(place.number))
            yield place.at * it.grain_size, data, grain


@dataclass(frozen=True, order=True)
class _Place:
    """Where one grain is."""

    pack: int
    number: int
    #: On the disk, in grains.
    at: int


def _windows(it: GrainMap) -> Iterator[list[_Place]]:
    window: list[_Place] = []
    for run in it.runs():
        for step in range(run.grains):
            window.append(_Place(run.pack, run.first + step, run.at + step))
            if len(window) == _WINDOW:
                yield window
                window = []
    yield window


def _inflated(it: GrainMap, place: _Place, data: bytes, expected: bytes) -> bytes:
    pack = it.packs[place.pack].id
    where = f"{it.where}, at byte {place.at * it.grain_size} of the disk: grain {place.number} of pack {pack}"
    grain = inflate(data, it.grain_size, where)
    if digest(grain) != expected:
        raise CorruptImage("A grain is not the one that was stored", where, REMEDY)
    return grain


def _fetch(store: Store, key: str, index: PackIndex, places: list[_Place], wait: Wait) -> Iterator[tuple[int, bytes]]:
    """The grains at rising places of one pack; what lies close together comes in one request."""
    for group in _close(index, places):
        start, end = index.span(group[0].number)[0], index.span(group[-1].number)[1]
        data = read_on(store, key, start, end - start, wait)
        for place in group:
            first, last = index.span(place.number)
            yield place.at, data[first - start : last - start]


def _close(index: PackIndex, places: Iterable[_Place]) -> Iterator[list[_Place]]:
    group: list[_Place] = []
    for place in places:
        if group and index.span(place.number)[0] - index.span(group[-1].number)[1] > _GAP:
            yield group
            group = []
        group.append(place)
    yield group


def read_on(store: Store, key: str, start: int, length: int, wait: Wait) -> bytes:
    """Bytes of an object; goes on where the connection broke."""
    got = bytearray()
    for chunk in Resuming(store.reader(key), wait, offset=start):
        got += chunk
        if len(got) >= length:
            return bytes(got[:length])
    raise CorruptImage("The pack is cut short", f"{store.name}:{key}", REMEDY)


def packs_of(store: Store, manifest: Manifest) -> dict[str, Pack]:
    """Every pack that a backup needs on its store, by key: what a copy of it has to bring along, unless it is there."""
    found: dict[str, Pack] = {}
    for entry in grain_maps(manifest):
        found |= {each.key(manifest.artifact.family): each for each in open_map(store, manifest, entry).packs}
    return found


def grain_maps(manifest: Manifest) -> list[Entry]:
    """The grain maps of a backup: none if it is a full one."""
    return [each for each in manifest.entries if each.role == ROLE]
