"""Write a qcow2 image (version 3) as a stream, without seeking back, so that any store can take it.

    header · data clusters · L1 table · refcount table · L2 tables · refcount blocks        all in clusters of 64 KiB

The header names the L1 table and the refcount table, so their offsets must be known before the first byte. They follow
from the largest possible number of data clusters. All other metadata follows the data.
https://www.qemu.org/docs/master/interop/qcow2.html (big-endian; its fields are listed in ``qcow2``)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from ssvm_worker.formats.detect import corrupt
from ssvm_worker.formats.extents import Extent, check_order, merge_chunks, zeros
from ssvm_worker.units import KiB

CLUSTER = 64 * KiB
#: Entries in a cluster: of 8 bytes, and of 2 bytes in refcount blocks.
_ENTRIES, _COUNTS = CLUSTER // 8, CLUSTER // 2
#: Bit 63 of an L1 or L2 entry: the refcount is exactly one.
_COPIED = 1 << 63
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")


def qcow2(extents: Iterable[Extent], capacity: int, clusters: int, where: str) -> Iterator[bytes]:
    """Return the chunks of a qcow2 image of a disk of *capacity* bytes. The extents touch at most *clusters* clusters.

    Raises CorruptImage if they touch more. Memory: one bit for each 64 KiB in each region of 512 MiB that has data. So
    a disk of 1 TiB needs 2 MiB.
    """
    return merge_chunks(_Layout(capacity, clusters).image(check_order(extents, capacity, where), where))


def most_clusters(capacity: int, populated: int, grain: int) -> int:
    """Return the largest number of clusters that *populated* bytes of data can touch, in grains of *grain* bytes."""
    return min(-(-capacity // CLUSTER), -(-populated // min(grain, CLUSTER)) + (grain > CLUSTER))


class _Layout:
    """Positions of all parts, in clusters from the beginning of the file."""

    def __init__(self, capacity: int, clusters: int) -> None:
        self._capacity = capacity
        self._clusters = clusters
        self._tables = -(-capacity // (CLUSTER * _ENTRIES))
        self._l1_at = 1 + clusters
        self._l1_clusters = -(-self._tables // _ENTRIES)
        self._refcounts_at = self._l1_at + self._l1_clusters
        max_clusters = self._refcounts_at + min(self._tables, clusters)
        # The blocks count themselves too. The refcount table is not counted yet: 8 clusters of it suffice for 128 PiB.
        self._refcount_clusters = -(-_blocks(max_clusters + 8) // _ENTRIES)
        #: One bit for each cluster of the disk that has data, by the number of its L2 table.
        self._used: dict[int, bytearray] = {}

    def image(self, extents: Iterable[Extent], where: str) -> Iterator[bytes]:
        yield self._header()
        written = 0
        for number, data in _in_clusters(extents):
            if written == self._clusters:
                raise corrupt(f"There is more data than the {self._clusters} clusters that were announced", where)
            table, place = divmod(number, _ENTRIES)
            bits = self._used.setdefault(table, bytearray(_ENTRIES // 8))
            bits[place >> 3] |= 1 << (place & 7)
            written += 1
            yield data
        yield from zeros((self._clusters - written) * CLUSTER)
        yield from self._metadata(written)

    def _header(self) -> bytes:
        l1, refcounts = self._l1_at * CLUSTER, self._refcounts_at * CLUSTER
        fields = (b"QFI\xfb", 3, 0, 0, 16, self._capacity, 0, self._tables, l1, refcounts, self._refcount_clusters)
        return _HEADER.pack(*fields, 0, 0, 0, 0, 0, 4, _HEADER.size).ljust(CLUSTER, b"\0")

    def _metadata(self, written: int) -> Iterator[bytes]:
        """Yield all tables behind the data."""
        l2_at = self._refcounts_at + self._refcount_clusters
        blocks_at = l2_at + len(self._used)
        blocks = _blocks(blocks_at)
        places = {table: l2_at + number for number, table in enumerate(sorted(self._used))}
        l1 = [places[each] * CLUSTER | _COPIED if each in places else 0 for each in range(self._tables)]
        yield from _padded(l1, self._l1_clusters)
        yield from _padded([(blocks_at + each) * CLUSTER for each in range(blocks)], self._refcount_clusters)
        yield from self._l2_tables()
        for block in range(blocks):
            yield self._refcount_block(block * _COUNTS, written, blocks_at + blocks)

    def _l2_tables(self) -> Iterator[bytes]:
        next_data = 1
        for table in sorted(self._used):
            bits, entries = self._used[table], [0] * _ENTRIES
            for place in range(_ENTRIES):
                if bits[place >> 3] >> (place & 7) & 1:
                    entries[place] = next_data * CLUSTER | _COPIED
                    next_data += 1
            yield struct.pack(f">{_ENTRIES}Q", *entries)

    def _refcount_block(self, first: int, written: int, total: int) -> bytes:
        """Return one refcount block: 1 for each cluster in use, 0 for unused clusters and behind the end."""
        counts = bytearray(CLUSTER)
        for start, end in ((0, 1 + written), (1 + self._clusters, total)):
            begin, stop = max(start, first), min(end, first + _COUNTS)
            if begin < stop:
                counts[2 * (begin - first) : 2 * (stop - first)] = b"\0\1" * (stop - begin)
        return bytes(counts)


def _blocks(clusters: int) -> int:
    """Return the number of refcount blocks that count *clusters* clusters and themselves."""
    return -(-clusters // (_COUNTS - 1))


def _in_clusters(extents: Iterable[Extent]) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each cluster that an extent touches. The extents may have any grain size."""
    number, held = -1, bytearray()
    for offset, data in extents:
        if not held and offset % CLUSTER == 0 and len(data) == CLUSTER:
            yield offset // CLUSTER, data
            continue
        for start in range(offset - offset % CLUSTER, offset + len(data), CLUSTER):
            if held and start // CLUSTER != number:
                yield number, bytes(held.ljust(CLUSTER, b"\0"))
                held.clear()
            number = start // CLUSTER
            begin = max(start, offset)
            held = held.ljust(begin - start, b"\0") + data[begin - offset : start + CLUSTER - offset]
    if held:
        yield number, bytes(held.ljust(CLUSTER, b"\0"))


def _padded(entries: list[int], clusters: int) -> Iterator[bytes]:
    """Yield a table in whole clusters."""
    for start in range(0, clusters * _ENTRIES, _ENTRIES):
        part = entries[start : start + _ENTRIES]
        yield struct.pack(f">{len(part)}Q", *part).ljust(CLUSTER, b"\0")
