"""Finds where the allocated units of a qcow2 end: its tables, its clusters, its compressed clusters.

L1 entry: the offset of an L2 table, in bits 9 to 55. L2 entry: bit 62 compressed, bit 0 zero, else as L1; a compressed
one has its offset in the low 70 - cluster bits, above them the number of further sectors of 512 that it reaches into.
Refcount table entry: the offset of a refcount block. Snapshot table entry: 0 L1, offset (u64) · 8 L1, entries (u32) ·
12 length of id (u16) · 14 length of name (u16) · 36 length of extra data (u32) · extra data: 8 virtual size (u64).

qcow2 may place a table before or behind the table that names it. So the file is read from its beginning to the end of
the L1 table and of the refcount table, and each cluster on the way that may be a table is summed up. Tables behind
that place are read as they pass.

The active L1 table leads to all data of the disk. Clusters that only snapshots or bitmaps use are found by refcount.
"""

from __future__ import annotations

import heapq
import struct
import zlib
from collections.abc import Generator
from typing import NamedTuple

from ssvm_worker.errors import TooLarge
from ssvm_worker.units import MiB

from .detect import ImageBytes, ImageFacts, ImageRange, corrupt, cut_short, entries

SECTOR = 512
_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_BITMAPS = 1
_DIRTY = 1
#: The first byte of an L2 entry: bit 63 says that its refcount is one, bit 62 that it is compressed. Bits 56 to 61 are
#: zero unless it is compressed.
_FIRST_BYTES = bytes([0x00, 0x80, *range(0x40, 0x80)])
#: Clusters that are summed up before it is known which are tables. An honest image has one for each 512 MiB.
_MAX_SUMS = 1 << 17
#: L2 tables and refcount blocks of one image: 512 TiB of clusters of 64 KiB, 32 GiB of clusters of 512 bytes.
_MAX_TABLES = 1 << 20
_SNAPSHOT_ENTRY = 40
#: qemu block/qcow2.h: QCOW_MAX_SNAPSHOT_EXTRA_DATA.
_MAX_EXTRA = 1024


class Header(NamedTuple):
    """The fields of the header, in their order."""

    magic: bytes
    version: int
    backing_offset: int
    backing_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = 72

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits


class _Sum(NamedTuple):
    """What one L2 table allocates."""

    #: Where the last of its units ends, and where that unit begins if it is compressed, else 0. One entry is left out:
    end: int
    packed: int
    #: the entry that, in the disk's last table, is the disk's last cluster.
    last: int
    #: Whether any unit is compressed.
    compressed: bool


class Units:
    """The running maximum of the ends of all allocated units, and the reader of the tables that name them.

    Bytes: holds the offsets of the L2 tables and refcount blocks, some 200 bytes for each; 2 MiB of the image.
    """

    def __init__(self, header: Header, bitmaps: bytes, zstd: bool, where: str) -> None:
        self._header = header
        #: The header extension of bitmaps, if there are any: 8 length (u64), 16 offset (u64) of their directory.
        self._bitmaps = bitmaps if header.autoclear & _BITMAPS and len(bitmaps) >= 24 else b""
        self._zstd = zstd
        self._where = where
        #: What the checks could not see; for the manifest.
        self.warnings: list[str] = []
        self._end, self._what = 0, ""
        self._packed, self._packed_data = 0, b""
        self._entries = header.cluster // 8
        last = (header.size - 1) // header.cluster
        self._last_table, self._last_entry = divmod(last, self._entries)
        #: Bytes that the disk has in its last cluster.
        self._rest = header.size - last * header.cluster
        #: Bytes in the last cluster of a snapshot's disk, at the least.
        self._snapshot_rest = header.cluster
        self._counted = bool(header.snapshots or self._bitmaps) and not header.incompatible & _DIRTY
        self._highest = -1
        self._compressed = False
        #: L2 tables by offset: whether it is the table of the disk's end. Refcount blocks by offset: their numbers.
        self._l2: dict[int, bool] = {}
        self._blocks: dict[int, int] = {}
        self._l2_known = self._blocks_known = False
        #: Sums of clusters that may be L2 tables, and the bits before the trailing zeros of maybe refcount blocks.
        self._sums: dict[int, _Sum] = {}
        self._filled: dict[int, int] = {}
        self._full = False

    def read(self) -> Generator[ImageRange | ImageFacts, ImageBytes, None]:
        """Read every table that the stream still has to offer."""
        header = self._header
        l1_end = header.l1_offset + header.l1_size * 8
        blocks_end = header.refcount_offset + header.refcount_clusters * header.cluster
        self._note(l1_end, "L1 table")
        self._note(blocks_end, "refcount table")
        if self._bitmaps:
            self._note(sum(struct.unpack_from(">QQ", self._bitmaps, 8)), "bitmap directory")
        behind = max(l1_end, blocks_end)
        yield from self._read_from_the_beginning(behind, l1_end, blocks_end)
        for offset, is_last in self._l2.items():
            self._note(offset + header.cluster, "last L2 table")
            if found := self._sums.get(offset):
                self._note_sum(found, is_last)
        for offset, number in self._blocks.items():
            self._note(offset + header.cluster, "last refcount block")
            self._note_block(number, self._filled.get(offset, 0))
        self._sums.clear()
        self._filled.clear()
        yield from self._read_behind(behind)
        if self._packed >= behind:
            # All but the last sector, which a writer need not fill.
            length = self._end - SECTOR - self._packed
            if length > 0:
                why = f"its last compressed cluster goes to offset {self._end - SECTOR} at least"
                self._packed_data = (yield ImageRange(self._packed, length, why)).data
        elif self._packed:
            self._packed = 0

    def check(self, tail: bytes, size: int) -> None:
        """Raise CorruptImage unless all units are in a file of *size* bytes that ends in *tail*."""
        self._note_highest()
        if self._end <= size:
            return
        sector = self._end - SECTOR
        if self._packed and size > max(sector, self._packed):
            data = self._packed_data + tail[-(size - max(sector, self._packed)) :]
            if _is_whole(data, self._header.cluster, self._zstd):
                return
        raise cut_short(f"its {self._what} goes to offset {self._end}", size, self._where)

    def _note(self, end: int, what: str, packed: int = 0) -> None:
        if (end, packed) > (self._end, self._packed):
            self._end, self._what, self._packed = end, what, packed

    def _read_from_the_beginning(
        self, until: int, l1_end: int, blocks_end: int
    ) -> Generator[ImageRange | ImageFacts, ImageBytes, None]:
        """Read all to *until*: it has the L1 table and the refcount table, and maybe tables that they name."""
        header, l1, blocks = self._header, bytearray(), bytearray()
        step = max(header.cluster, MiB)
        why = f"its L1 table goes to offset {l1_end}, its refcount table to {blocks_end}"
        for at in range(0, until, step):
            piece = (yield ImageRange(at, min(step, until - at), why)).data
            l1 += piece[max(0, header.l1_offset - at) : max(0, l1_end - at)]
            blocks += piece[max(0, header.refcount_offset - at) : max(0, blocks_end - at)]
            if not self._l2_known and len(l1) == header.l1_size * 8:
                self._l2, self._l2_known = self._l2_tables(bytes(l1)), True
            if not self._blocks_known and len(blocks) == blocks_end - header.refcount_offset:
                self._blocks, self._blocks_known = self._refcount_blocks(bytes(blocks)), True
            for start in range(0, len(piece), header.cluster):
                self._sum_up(at + start, piece[start : start + header.cluster])
        if self._full:
            self.warnings.append(
                "Too many clusters look like tables: not all L2 tables and refcount blocks of the qcow2 were checked"
            )

    def _sum_up(self, offset: int, cluster: bytes) -> None:
        """Keep what a cluster says if it is a table, or may be one."""
        if self._could_be_l2(offset, cluster):
            found = self._sum(cluster)
            if any(found):
                self._full = self._full or len(self._sums) >= _MAX_SUMS
                if not self._full or self._l2_known:
                    self._sums[offset] = found
        if self._counted and self._could_be_counts(offset, cluster):
            filled = _bits(cluster)
            if filled:
                self._full = self._full or len(self._filled) >= _MAX_SUMS
                if not self._full or self._blocks_known:
                    self._filled[offset] = filled

    def _could_be_l2(self, offset: int, cluster: bytes) -> bool:
        return offset in self._l2 if self._l2_known else not cluster[0::8].translate(None, _FIRST_BYTES)

    def _could_be_counts(self, offset: int, cluster: bytes) -> bool:
        if self._blocks_known:
            return offset in self._blocks
        # A refcount of two bytes or more is small, as it counts snapshots: its first byte is zero.
        return self._header.refcount_order < 4 or not any(cluster[0 :: 1 << self._header.refcount_order - 3])

    def _l2_tables(self, l1: bytes) -> dict[int, bool]:
        """Whether each L2 table is that of the disk's end, by its offset."""
        tables: dict[int, bool] = {}
        for number, entry in entries(l1, ">Q"):
            if entry & _OFFSET and (offset := self._table_at(entry, len(tables), "L2 table")):
                tables[offset] = number == self._last_table or tables.get(offset, False)
        return tables

    def _refcount_blocks(self, table: bytes) -> dict[int, int]:
        """The number of each refcount block, by its offset."""
        blocks: dict[int, int] = {}
        for number, entry in entries(table, ">Q"):
            if entry & _OFFSET and (offset := self._table_at(entry, len(blocks), "refcount block")):
                blocks[offset] = number
        return blocks

    def _table_at(self, entry: int, known: int, what: str) -> int:
        offset = entry & _OFFSET
        if offset % self._header.cluster:
            raise corrupt(f"The qcow2 has its {what} at offset {offset}", self._where)
        if offset and known >= _MAX_TABLES:
            raise TooLarge(
                f"The qcow2 has more than {_MAX_TABLES} tables of one kind, which cannot be checked",
                self._where,
                "Convert it to larger clusters: qemu-img convert -O qcow2 -o cluster_size=64k IN OUT",
            )
        return offset

    def _read_behind(self, behind: int) -> Generator[ImageRange | ImageFacts, ImageBytes, None]:
        """Read the tables that begin behind *behind*, in the order of the file."""
        cluster = self._header.cluster
        places = [offset for offset in {*self._l2, *self._blocks} if offset >= behind]
        heapq.heapify(places)
        snapshots = self._header.snapshots_offset if self._header.snapshots else 0
        while places or snapshots:
            if snapshots and (snapshots < behind or not places or snapshots < places[0]):
                # A snapshot table before the L1 table is complete if the L1 table is.
                if snapshots >= behind:
                    yield from self._read_snapshots(snapshots)
                snapshots = 0
                continue
            offset = heapq.heappop(places)
            table = (yield ImageRange(offset, cluster, f"its table at offset {offset} has {cluster} bytes")).data
            if offset in self._l2:
                self._note_sum(self._sum(table), self._l2[offset])
            if offset in self._blocks:
                self._note_block(self._blocks[offset], _bits(table))

    def _read_snapshots(self, at: int) -> Generator[ImageRange | ImageFacts, ImageBytes, None]:
        """Read the snapshot table: entries of any length, aligned to 8 bytes."""
        why = f"it has {self._header.snapshots} snapshots"
        for _ in range(self._header.snapshots):
            entry = (yield ImageRange(at, _SNAPSHOT_ENTRY, why)).data
            l1_offset, l1_size, id_length, name_length = struct.unpack_from(">QIHH", entry)
            extra_length = struct.unpack_from(">I", entry, 36)[0]
            if extra_length > _MAX_EXTRA:
                raise corrupt(f"The qcow2 has a snapshot with {extra_length} bytes of extra data", self._where)
            extra = (yield ImageRange(at + _SNAPSHOT_ENTRY, extra_length + id_length + name_length, why)).data
            size = struct.unpack_from(">Q", extra, 8)[0] if extra_length >= 16 else self._header.size
            self._snapshot_rest = min(self._snapshot_rest, size % self._header.cluster or self._header.cluster)
            self._note(l1_offset + l1_size * 8, "last snapshot's L1 table")
            end = at + _SNAPSHOT_ENTRY + len(extra)
            self._note(end, "snapshot table")
            at = end + -end % 8

    def _sum(self, table: bytes) -> _Sum:
        end = packed = last = 0
        compressed = False
        cluster, bits = self._header.cluster, 70 - self._header.cluster_bits
        for number, entry in entries(table[: len(table) // 8 * 8], ">Q"):
            if entry & _COMPRESSED:
                compressed = True
                offset, sectors = entry & ((1 << bits) - 1), (entry & (_COMPRESSED - 1)) >> bits
                end, packed = max((end, packed), ((offset // SECTOR + sectors + 1) * SECTOR, offset))
            elif offset := entry & _OFFSET:
                if number == self._last_entry:
                    last = offset
                else:
                    end, packed = max((end, packed), (offset + cluster, 0))
        return _Sum(end, packed, last, compressed)

    def _note_sum(self, found: _Sum, is_last: bool) -> None:
        self._compressed = self._compressed or found.compressed
        self._note(found.end, "last cluster", found.packed)
        if found.last:
            self._note(found.last + (self._rest if is_last else self._header.cluster), "last cluster")

    def _note_block(self, number: int, filled: int) -> None:
        """Note the last cluster that a refcount block counts; it has *filled* bits before its trailing zeros."""
        if filled:
            width = 1 << self._header.refcount_order
            self._highest = max(self._highest, (number * self._header.cluster * 8 + filled - 1) // width)

    def _note_highest(self) -> None:
        """Note the last cluster that is counted, if it is behind all that is known."""
        start = self._highest * self._header.cluster
        if not self._counted or start < self._end:
            return
        if self._compressed or self._bitmaps:  # neither compressed data nor a bitmap's table fills its cluster
            self._note(start + 1, "last cluster of a snapshot or bitmap")
            self.warnings.append(
                f"A snapshot or bitmap uses the last cluster, at offset {start}: its end was not checked,"
                " as such a cluster may be short"
            )
        else:
            self._note(start + min(self._rest, self._snapshot_rest), "last cluster of a snapshot or bitmap")


def _bits(block: bytes) -> int:
    """The bits of a refcount block before its trailing zeros."""
    filled = block.rstrip(b"\0")
    return 8 * (len(filled) - 1) + filled[-1].bit_length() if filled else 0


def _is_whole(data: bytes, cluster: int, zstd: bool) -> bool:
    """Whether compressed data, of which a part of the last sector may be missing, gives a whole cluster."""
    if zstd:
        return _zstd_is_whole(data)
    try:
        return len(zlib.decompressobj(-12).decompress(data, cluster)) == cluster
    except zlib.error:
        return False


def _zstd_is_whole(data: bytes) -> bool:
    """Whether a zstandard frame ends in *data*: RFC 8878, 3.1.1. The blocks are stepped over, not decompressed."""
    if len(data) < 6 or not data.startswith(b"\x28\xb5\x2f\xfd"):
        return False
    flags = data[4]
    single = flags >> 5 & 1
    content_size = (single, 2, 4, 8)[flags >> 6]
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3] + content_size
    while at + 3 <= len(data):
        block = int.from_bytes(data[at : at + 3], "little")
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        if block & 1:
            return at + 4 * (flags >> 2 & 1) <= len(data)
    return False
