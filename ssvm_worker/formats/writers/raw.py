"""Write a raw disk image: each byte at its offset, zeros in the holes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ssvm_worker.formats.extents import Extent, check_order, merge_chunks, zeros


def raw(extents: Iterable[Extent], capacity: int, where: str) -> Iterator[bytes]:
    """Return the chunks of a raw image of *capacity* bytes."""

    def fill_holes() -> Iterator[bytes]:
        at = 0
        for offset, data in check_order(extents, capacity, where):
            yield from zeros(offset - at)
            yield data
            at = offset + len(data)
        yield from zeros(capacity - at)

    return merge_chunks(fill_holes())
