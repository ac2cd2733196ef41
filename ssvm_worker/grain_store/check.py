"""Reads the packs of a backup again, and names what is damaged: by pack, by backup, and by place on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from ssvm_worker.artifacts.manifest import Manifest
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.streaming.interfaces import Observer, Store
from ssvm_worker.units import MiB

from .garbage import maps_below
from .grain import REMEDY, digest, inflate
from .map import GrainMap, GrainRun
from .pack import MAGIC, Pack, PackIndex, index_in, read_index
from .reader import Wait, packs_of, read_on

#: No grain inflates to more: VMDK's have 64 KiB.
_LARGEST_GRAIN = 4 * MiB
#: Places of one disk that are named; the rest is counted.
_NAMED = 4
_SECTOR = 512


@dataclass(frozen=True)
class Damage:
    """What is wrong with one pack."""

    key: str
    pack: Pack
    why: str
    #: The grains of it that are lost; None for all.
    grains: frozenset[int] | None

    def __str__(self) -> str:
        lost = "all its grains" if self.grains is None else f"{len(self.grains)} of its {self.pack.grains} grains"
        return f"{self.key}: {lost} are lost: {self.why}"


def damages(store: Store, manifest: Manifest, see: Observer, wait: Wait, sound: set[str]) -> Iterator[Damage]:
    """Read each pack that a backup needs, whole, and compare every grain in it with its digest.

    *see* gets the packs' bytes, for progress and to be cancelled. Packs whose keys are in *sound* were found to be so
    just now and are not read again; more are added. Holds one pack.
    Raises StoreUnavailable; CorruptImage for a grain map that cannot be read.
    """
    for key, pack in packs_of(store, manifest).items():
        if key in sound:
            continue
        try:
            index = read_index(store, manifest.artifact.family, pack)
            data = read_on(store, key, 0, pack.size, wait)
        except (CorruptImage, ObjectNotFound) as error:
            yield Damage(key, pack, error.what, None)
            continue
        see(data)
        lost = {number: why for number in range(len(index)) if (why := _wrong(data, index, number))}
        if data[: len(MAGIC)] != MAGIC:
            yield Damage(key, pack, "its first bytes are others", frozenset(lost))
        elif lost:
            yield Damage(key, pack, next(iter(lost.values())), frozenset(lost))
        else:
            sound.add(key)


def read_pack(store: Store, family: str, pack: Pack, wait: Wait) -> bytes:
    """All bytes of a pack that a map names, after every grain was compared with its digest. Holds it: 33 MiB.

    Raises CorruptImage, ObjectNotFound, StoreUnavailable and SourceUnavailable.
    """
    key = pack.key(family)
    where = f"{store.name}:{key}"
    data = read_on(store, key, 0, pack.size, wait)
    index = index_in(pack, data[pack.index_at :], where)
    wrong = "" if data[: len(MAGIC)] == MAGIC else "its first bytes are others"
    wrong = wrong or next((why for number in range(len(index)) if (why := _wrong(data, index, number))), "")
    if wrong:
        raise CorruptImage(f"A pack of grains is damaged: {wrong}", where, REMEDY)
    return data


def _wrong(data: bytes, index: PackIndex, number: int) -> str:
    start, end = index.span(number)
    try:
        grain = inflate(data[start:end], _LARGEST_GRAIN, "")
    except CorruptImage as error:
        return error.what
    return "" if digest(grain) == index.digest(number) else "a grain has another digest"


def hit(store: Store, family: str, found: list[Damage]) -> Iterator[str]:
    """Which disks of which backups of the volume are hit by that, and where: LBAs, in sectors."""
    lost = {each.pack.id: each for each in found}
    for key in maps_below(store, family):
        try:
            places = list(_places(GrainMap(store, key), lost))
        except (CorruptImage, ObjectNotFound) as error:
            yield f"{key}: {error.what}"
            continue
        if places:
            named = ", ".join(f"{first}-{last}" for first, last in islice(places, _NAMED))
            more = f" and {len(places) - _NAMED} more places" if len(places) > _NAMED else ""
            yield f"{key} lacks LBA {named}{more}"


def _places(it: GrainMap, lost: Mapping[str, Damage]) -> Iterator[tuple[int, int]]:
    """First and last sector of each stretch of the disk that is lost."""
    sectors = it.grain_size // _SECTOR
    end = it.capacity // _SECTOR
    for run in it.runs():
        if damage := lost.get(it.packs[run.pack].id):
            for at, grains in _lost_of(run, damage.grains):
                yield at * sectors, min(end, (at + grains) * sectors) - 1


def _lost_of(run: GrainRun, lost: frozenset[int] | None) -> Iterator[tuple[int, int]]:
    """Place on the disk and length, in grains, of what is lost of a run."""
    if lost is None:
        yield run.at, run.grains
        return
    for number in sorted(lost):
        if run.first <= number < run.first + run.grains:
            yield run.at + number - run.first, 1
