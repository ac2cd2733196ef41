"""Read the packs of a backup again and report damage: by pack, by backup, and by range of the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from ssvm_worker.artifacts.manifest import Manifest
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.streaming.interfaces import Observer, Store
from ssvm_worker.units import MiB

from .garbage import maps_below
from .map import GrainMap
from .pack import MAGIC, REMEDY, Pack, PackIndex, digest, index_in, inflate, read_index
from .reader import Wait, packs_of, read_with_retries

#: The largest inflated grain. Grains of a VMDK have 64 KiB.
_MAX_GRAIN_SIZE = 4 * MiB
#: A message names this many ranges of one disk. It only counts the others.
_MAX_NAMED_RANGES = 4
_SECTOR = 512
_BAD_MAGIC = "the pack has a bad magic number"


@dataclass(frozen=True)
class Damage:
    """The damage of one pack."""

    key: str
    pack: Pack
    reason: str
    #: The numbers of the lost grains; None if all grains are lost.
    grains: frozenset[int] | None

    def __str__(self) -> str:
        lost = "all its grains" if self.grains is None else f"{len(self.grains)} of its {self.pack.grains} grains"
        return f"{self.key}: {lost} are lost: {self.reason}"


def damages(store: Store, manifest: Manifest, observe: Observer, wait: Wait, undamaged: set[str]) -> Iterator[Damage]:
    """Read each pack of a backup completely, and compare each grain with its digest.

    *observe* gets the bytes of the packs. It can count progress, and raise to cancel. The function skips packs whose
    keys are in *undamaged*, and adds the packs that it finds undamaged. Holds one pack in memory.
    Raises StoreUnavailable, and CorruptImage for an unreadable grain map.
    """
    for key, pack in packs_of(store, manifest).items():
        if key in undamaged:
            continue
        try:
            index = read_index(store, manifest.artifact.family, pack)
            data = read_with_retries(store, key, 0, pack.size, wait)
        except (CorruptImage, ObjectNotFound) as error:
            yield Damage(key, pack, error.what, None)
            continue
        observe(data)
        lost = dict(_damaged_grains(data, index))
        if data[: len(MAGIC)] != MAGIC:
            yield Damage(key, pack, _BAD_MAGIC, frozenset(lost))
        elif lost:
            yield Damage(key, pack, next(iter(lost.values())), frozenset(lost))
        else:
            undamaged.add(key)


def read_pack(store: Store, family: str, pack: Pack, wait: Wait) -> bytes:
    """Read a pack of a grain map, and compare each grain with its digest. Holds the pack in memory: 33 MiB.

    Raises CorruptImage, ObjectNotFound, StoreUnavailable and SourceUnavailable.
    """
    key = pack.key(family)
    location = f"{store.name}:{key}"
    data = read_with_retries(store, key, 0, pack.size, wait)
    index = index_in(pack, data[pack.index_at :], location)
    damage = "" if data[: len(MAGIC)] == MAGIC else _BAD_MAGIC
    damage = damage or next((reason for _, reason in _damaged_grains(data, index)), "")
    if damage:
        raise CorruptImage(f"A pack of grains is damaged: {damage}", location, REMEDY)
    return data


def _damaged_grains(data: bytes, index: PackIndex) -> Iterator[tuple[int, str]]:
    """Yield the number of each damaged grain of a pack, and the reason."""
    for number in range(len(index)):
        start, end = index.span(number)
        try:
            grain = inflate(data[start:end], _MAX_GRAIN_SIZE, "")
        except CorruptImage as error:
            yield number, error.what
            continue
        if digest(grain) != index.digest(number):
            yield number, "a grain does not match its digest"


def affected_backups(store: Store, family: str, found: list[Damage]) -> Iterator[str]:
    """Yield a message for each disk of the volume's backups that lost grains, with LBA ranges in sectors."""
    lost = {each.pack.id: each for each in found}
    for key in maps_below(store, family):
        try:
            ranges = list(_lost_ranges(GrainMap(store, key), lost))
        except (CorruptImage, ObjectNotFound) as error:
            yield f"{key}: {error.what}"
            continue
        if ranges:
            named = ", ".join(f"{first}-{last}" for first, last in islice(ranges, _MAX_NAMED_RANGES))
            rest = len(ranges) - _MAX_NAMED_RANGES
            more = f" and {rest} more ranges" if rest > 0 else ""
            yield f"{key} lacks LBA {named}{more}"


def _lost_ranges(grain_map: GrainMap, lost: Mapping[str, Damage]) -> Iterator[tuple[int, int]]:
    """Yield the first and last sector of each lost range of the disk."""
    sectors = grain_map.grain_size // _SECTOR
    end = grain_map.capacity // _SECTOR
    for run in grain_map.runs():
        damage = lost.get(grain_map.packs[run.pack].id)
        if damage is None:
            continue
        if damage.grains is None:
            ranges = [(run.at, run.grains)]
        else:
            inside = (each for each in sorted(damage.grains) if run.first <= each < run.first + run.grains)
            ranges = [(run.at + each - run.first, 1) for each in inside]
        for at, grains in ranges:
            yield at * sectors, min(end, (at + grains) * sectors) - 1
