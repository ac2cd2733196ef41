"""Tells where two disks of a volume differ, by their grain maps alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from ssvm_worker.streaming.interfaces import Store

from .map import GrainMap, GrainRun
from .pack import PackIndex, read_index

#: Place on the disk and length, both in bytes.
Area = tuple[int, int]


def differing(store: Store, family: str, one: GrainMap, other: GrainMap) -> Iterator[Area]:
    """Yield each grain that is not the same in both, in order; grains that one has and the other has not, too.

    The maps must have grains of one size. Packs are asked only where both have a grain at a place, in two packs.
    """

    @lru_cache(512)
    def index_of(it: GrainMap, number: int) -> PackIndex:
        return read_index(store, family, it.packs[number])

    def digest(it: GrainMap, run: GrainRun, at: int) -> bytes:
        return index_of(it, run.pack).digest(run.first + at - run.at)

    for start, end, left, right in _side_by_side(one, other):
        if left and right and _same_place(one, left, other, right):
            continue
        for at in range(start, end):
            if not (left and right) or digest(one, left, at) != digest(other, right, at):
                yield at * one.grain_size, one.grain_size


def _same_place(one: GrainMap, left: GrainRun, other: GrainMap, right: GrainRun) -> bool:
    """Whether two runs that overlap are of the very same grains there."""
    aligned = left.first - left.at == right.first - right.at
    return aligned and one.packs[left.pack].id == other.packs[right.pack].id


def _side_by_side(one: GrainMap, other: GrainMap) -> Iterator[tuple[int, int, GrainRun | None, GrainRun | None]]:
    """Stretches of the disk (first grain, the one behind the last) that lie in one run, or none, of each map."""
    lefts, rights = _Runs(one), _Runs(other)
    at = 0
    while lefts.run or rights.run:
        start = min(max(at, run.at) for run in (lefts.run, rights.run) if run)
        end = min(each.until(start) for each in (lefts, rights))
        yield start, end, lefts.over(start), rights.over(start)
        at = end
        lefts.pass_by(end)
        rights.pass_by(end)


class _Runs:
    """The runs of a map, the present one in ``run``."""

    def __init__(self, it: GrainMap) -> None:
        self._runs = it.runs()
        self.run = next(self._runs, None)

    def over(self, at: int) -> GrainRun | None:
        """The run that covers a place, if there is one."""
        return self.run if self.run and self.run.at <= at else None

    def until(self, at: int) -> int:
        """Where what covers a place, or the gap there, ends."""
        if self.run is None:
            return 1 << 62
        return self.run.at + self.run.grains if self.run.at <= at else self.run.at

    def pass_by(self, at: int) -> None:
        """Go on to the first run that reaches beyond a place."""
        while self.run and self.run.at + self.run.grains <= at:
            self.run = next(self._runs, None)


def outside(grains: Iterator[Area], areas: list[Area]) -> Iterator[Area]:
    """Yield those grains that no area touches; both in order."""
    rest = iter(areas)
    area = next(rest, None)
    for start, length in grains:
        while area and area[0] + area[1] <= start:
            area = next(rest, None)
        if area is None or area[0] >= start + length:
            yield start, length
