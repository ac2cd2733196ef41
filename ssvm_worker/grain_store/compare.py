"""Find the ranges in which two disks of a volume differ. Only their grain maps are needed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from ssvm_worker.streaming.interfaces import Store

from .map import GrainMap, GrainRun
from .pack import PackIndex, digest, read_index

#: Offset on the disk and length, both in bytes.
Area = tuple[int, int]
_END_OF_DISK = 1 << 62


def differing(store: Store, family: str, one: GrainMap, other: GrainMap) -> Iterator[Area]:
    """Yield each grain that differs between two maps, in order.

    A grain of zeros equals no grain: a host may send an allocated area of zeros in one export and omit it in the next.
    Both maps must have the same grain size. The function reads no pack index where both maps have the same grains of
    the same pack.
    """
    zeros = {digest(bytes(size)) for size in (one.grain_size, one.capacity % one.grain_size)}

    @lru_cache(512)
    def index_of(grain_map: GrainMap, number: int) -> PackIndex:
        return read_index(store, family, grain_map.packs[number])

    def content(grain_map: GrainMap, run: GrainRun | None, at: int) -> bytes | None:
        """Return the digest of a grain, or None for zeros."""
        if run is None:
            return None
        found = index_of(grain_map, run.pack).digest(run.first + at - run.at)
        return None if found in zeros else found

    for start, end, left, right in _side_by_side(one, other):
        if (
            left
            and right
            and left.first - left.at == right.first - right.at
            and one.packs[left.pack].id == other.packs[right.pack].id
        ):
            continue  # both have the same grains of the same pack
        for at in range(start, end):
            if content(one, left, at) != content(other, right, at):
                yield at * one.grain_size, one.grain_size


def _side_by_side(one: GrainMap, other: GrainMap) -> Iterator[tuple[int, int, GrainRun | None, GrainRun | None]]:
    """Yield ranges of the disk in which each map has exactly one run, or none.

    Each range has the number of its first grain, and the number after its last grain.
    """
    lefts, rights = _Runs(one), _Runs(other)
    at = 0
    while lefts.run or rights.run:
        start = min(max(at, run.at) for run in (lefts.run, rights.run) if run)
        end = min(each.end_of_range(start) for each in (lefts, rights))
        yield start, end, lefts.covering(start), rights.covering(start)
        at = end
        lefts.skip_to(end)
        rights.skip_to(end)


class _Runs:
    """The runs of a map, with the current run in ``run``."""

    def __init__(self, grain_map: GrainMap) -> None:
        self._runs = grain_map.runs()
        self.run = next(self._runs, None)

    def covering(self, at: int) -> GrainRun | None:
        """Return the run that covers a grain of the disk, or None."""
        return self.run if self.run and self.run.at <= at else None

    def end_of_range(self, at: int) -> int:
        """Return the end of the run, or of the gap, that covers a grain of the disk."""
        if self.run is None:
            return _END_OF_DISK
        return self.run.at + self.run.grains if self.run.at <= at else self.run.at

    def skip_to(self, at: int) -> None:
        """Skip all runs that end at or before a grain of the disk."""
        while self.run and self.run.at + self.run.grains <= at:
            self.run = next(self._runs, None)


def outside(grains: Iterator[Area], areas: list[Area]) -> Iterator[Area]:
    """Yield the grains that overlap no area. Grains and areas must be in order."""
    rest = iter(areas)
    area = next(rest, None)
    for start, length in grains:
        while area and area[0] + area[1] <= start:
            area = next(rest, None)
        if area is None or area[0] >= start + length:
            yield start, length
