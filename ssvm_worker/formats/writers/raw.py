"""Writes a raw disk image: every byte in its place, zeros where the disk has nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ssvm_worker.formats.extents import Extent, gathered, holes, in_order


def raw(extents: Iterable[Extent], capacity: int, where: str) -> Iterator[bytes]:
    """The chunks of a raw image of *capacity* bytes."""
    return gathered(_laid_out(in_order(extents, capacity, where), capacity))


def _laid_out(extents: Iterable[Extent], capacity: int) -> Iterator[bytes]:
    at = 0
    for offset, data in extents:
        yield from holes(offset - at)
        yield data
        at = offset + len(data)
    yield from holes(capacity - at)
