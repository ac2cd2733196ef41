"""Find where the allocated units of a qcow2 end: its tables, its clusters and its compressed clusters.

L1 entry: the offset of an L2 table, in bits 9 to 55.
L2 entry: bit 62 compressed, bit 0 zero, else as L1. A compressed one has its offset in the low 70 - cluster bits. The
bits above are the number of further sectors of 512 bytes that it uses.
Refcount table entry: the offset of a refcount block.
Snapshot table entry: 0 L1, offset (u64) · 8 L1, entries (u32) · 12 length of id (u16) · 14 length of name (u16) · 36
length of extra data (u32) · extra data: 8 virtual size (u64).

qcow2 may place a table before or behind the table that names it. So the file is read from its beginning to the end of
the L1 table and of the refcount table. Each cluster before this offset that may be a table is summarised. Tables behind
this offset are read as they pass.

The active L1 table leads to all data of the disk. Clusters of only snapshots or bitmaps are found by refcount.
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
#: First bytes of an L2 entry. Bit 63: the refcount is one. Bit 62: the entry is compressed. Bits 56 to 61 are zero in
#: an entry that is not compressed.
_FIRST_BYTES = bytes([0x00, 0x80, *range(0x40, 0x80)])
#: Summaries of clusters that may be tables. A normal image has one for each 512 MiB.
_MAX_SUMMARIES = 1 << 17
#: L2 tables and refcount blocks of one image: 512 TiB in clusters of 64 KiB, 32 GiB in clusters of 512 bytes.
_MAX_TABLES = 1 << 20
_SNAPSHOT_ENTRY = 40
#: qemu block/qcow2.h: QCOW_MAX_SNAPSHOT_EXTRA_DATA.
_MAX_EXTRA = 1024


class Header(NamedTuple):
    """Fields of the header, in their order."""

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
        """Return the bytes of a cluster."""
        return 1 << self.cluster_bits


class _L2Summary(NamedTuple):
    """Units that one L2 table allocates. One entry is kept apart in *last*."""

    #: The end of the last unit. The start of this unit if it is compressed, else 0.
    end: int
    packed: int
    #: Offset in the entry that is the disk's last cluster, if this table is the disk's last table.
    last: int
    #: Whether any unit is compressed.
    compressed: bool


class Units:
    """Reader of the tables. It keeps the maximum of the ends of all allocated units.

    Memory: 2 MiB of the image, and about 200 bytes for each L2 table and refcount block.
    """

    def __init__(self, header: Header, bitmaps: bytes, zstd: bool, where: str) -> None:
        self._header = header
        #: The header extension of bitmaps, or b"": 8 length (u64), 16 offset (u64) of their directory.
        self._bitmaps = bitmaps if header.autoclear & _BITMAPS and len(bitmaps) >= 24 else b""
        self._zstd = zstd
        self._where = where
        #: What the checks could not see. The manifest keeps the warnings.
        self.warnings: list[str] = []
        self._end, self._what = 0, ""
        self._packed, self._packed_data = 0, b""
        self._entries = header.cluster // 8
        last = (header.size - 1) // header.cluster
        self._last_table, self._last_entry = divmod(last, self._entries)
        #: Bytes of the disk in its last cluster.
        self._rest = header.size - last * header.cluster
        #: The smallest number of bytes in the last cluster of a snapshot's disk.
        self._snapshot_rest = header.cluster
        #: Whether refcounts are read.
        self._use_refcounts = bool(header.snapshots or self._bitmaps)
        if self._use_refcounts and header.incompatible & _DIRTY:
            self._use_refcounts = False
            self.warnings.append(
                "The qcow2 was not closed, so its refcounts may be wrong: the end of the data of its snapshots and"
                " bitmaps was not checked"
            )
        self._highest = -1
        self._compressed = False
        #: L2 tables: whether it is the last table of the disk, by offset.
        self._l2: dict[int, bool] = {}
        #: Numbers of the refcount blocks, by offset.
        self._blocks: dict[int, int] = {}
        self._l2_known = self._blocks_known = False
        #: Summaries of clusters that may be L2 tables, by offset.
        self._summaries: dict[int, _L2Summary] = {}
        #: Used bits of clusters that may be refcount blocks, by offset.
        self._used_bits: dict[int, int] = {}
        #: Whether the number of summaries has reached its limit.
        self._full = False

    def read(self) -> Generator[ImageRange | ImageFacts, ImageBytes, None]:
        """Read all tables."""
        header = self._header
        l1_end = header.l1_offset + header.l1_size * 8
        blocks_end = header.refcount_offset + header.refcount_clusters * header.cluster
        self._record_end(l1_end, "L1 table")
        self._record_end(blocks_end, "refcount table")
        if self._bitmaps:
            self._record_end(sum(struct.unpack_from(">QQ", self._bitmaps, 8)), "bitmap directory")
        behind = max(l1_end, blocks_end)
        yield from self._read_start(behind, l1_end, blocks_end)
        for offset, is_last in self._l2.items():
            self._record_end(offset + header.cluster, "last L2 table")
            if summary := self._summaries.get(offset):
                self._record_summary(summary, is_last)
        for offset, number in self._blocks.items():
            self._record_end(offset + header.cluster, "last refcount block")
            self._record_block(number, self._used_bits.get(offset, 0))
        self._summaries.clear()
        self._used_bits.clear()
        yield from self._read_behind(behind)
        if self._packed >= behind:
            # The last sector is left out: a writer may leave it partly unwritten.
            length = self._end - SECTOR - self._packed
            if length > 0:
                why = f"its last compressed cluster ends at offset {self._end - SECTOR} or later"
                self._packed_data = (yield ImageRange(self._packed, length, why)).data
        elif self._packed:
            self._packed = 0

    def check(self, tail: bytes, size: int) -> None:
        """Raise CorruptImage unless all units are in a file of *size* bytes that ends in *tail*."""
        self._record_highest()
        if self._end <= size:
            return
        sector = self._end - SECTOR
        if self._packed and size > max(sector, self._packed):
            data = self._packed_data + tail[-(size - max(sector, self._packed)) :]
            if _is_complete(data, self._header.cluster, self._zstd):
                return
        raise cut_short(f"its {self._what} ends at offset {self._end}", size, self._where)

    def _record_end(self, end: int, what: str, packed: int = 0) -> None:
        if (end, packed) > (self._end, self._packed):
            self._end, self._what, self._packed = end, what, packed

    def _read_start(
        self, until: int, l1_end: int, blocks_end: int
    ) -> Generator[ImageRange | ImageFacts, ImageBytes, None]:
        """Read all bytes before *until*: the L1 table, the refcount table, and maybe tables that they name."""
        header, l1, blocks = self._header, bytearray(), bytearray()
        step = max(header.cluster, MiB)
        why = f"its L1 table ends at offset {l1_end}, its refcount table at {blocks_end}"
        for at in range(0, until, step):
            piece = (yield ImageRange(at, min(step, until - at), why)).data
            l1 += piece[max(0, header.l1_offset - at) : max(0, l1_end - at)]
            blocks += piece[max(0, header.refcount_offset - at) : max(0, blocks_end - at)]
            if not self._l2_known and len(l1) == header.l1_size * 8:
                self._l2, self._l2_known = self._l2_tables(bytes(l1)), True
            if not self._blocks_known and len(blocks) == blocks_end - header.refcount_offset:
                self._blocks, self._blocks_known = self._refcount_blocks(bytes(blocks)), True
            for start in range(0, len(piece), header.cluster):
                self._summarise(at + start, piece[start : start + header.cluster])
        if self._full:
            self.warnings.append(
                "Too many clusters look like tables: not all L2 tables and refcount blocks of the qcow2 were checked"
            )

    def _summarise(self, offset: int, cluster: bytes) -> None:
        """Keep a summary of a cluster that is a table or may be one."""
        if offset in self._l2 if self._l2_known else not cluster[0::8].translate(None, _FIRST_BYTES):
            summary = self._summary(cluster)
            if any(summary):
                self._full = self._full or len(self._summaries) >= _MAX_SUMMARIES
                if not self._full or self._l2_known:
                    self._summaries[offset] = summary
        if self._use_refcounts and self._could_be_refcounts(offset, cluster):
            bits = _used_bits(cluster)
            if bits:
                self._full = self._full or len(self._used_bits) >= _MAX_SUMMARIES
                if not self._full or self._blocks_known:
                    self._used_bits[offset] = bits

    def _could_be_refcounts(self, offset: int, cluster: bytes) -> bool:
        if self._blocks_known:
            return offset in self._blocks
        # A refcount of two bytes or more is small because it counts snapshots. So its first byte is zero.
        return self._header.refcount_order < 4 or not any(cluster[0 :: 1 << self._header.refcount_order - 3])

    def _l2_tables(self, l1: bytes) -> dict[int, bool]:
        """Return the offset of each L2 table, and whether it is the last table of the disk."""
        tables: dict[int, bool] = {}
        for number, entry in entries(l1, ">Q"):
            if entry & _OFFSET and (offset := self._table_offset(entry, len(tables), "L2 table")):
                tables[offset] = number == self._last_table or tables.get(offset, False)
        return tables

    def _refcount_blocks(self, table: bytes) -> dict[int, int]:
        """Return the offset and the number of each refcount block."""
        blocks: dict[int, int] = {}
        for number, entry in entries(table, ">Q"):
            if entry & _OFFSET and (offset := self._table_offset(entry, len(blocks), "refcount block")):
                blocks[offset] = number
        return blocks

    def _table_offset(self, entry: int, known: int, what: str) -> int:
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
        """Read the tables that begin at *behind* or later, in the order of the file."""
        cluster = self._header.cluster
        offsets = [offset for offset in {*self._l2, *self._blocks} if offset >= behind]
        heapq.heapify(offsets)
        snapshots = self._header.snapshots_offset if self._header.snapshots else 0
        while offsets or snapshots:
            if snapshots and (snapshots < behind or not offsets or snapshots < offsets[0]):
                # A snapshot table before the L1 table is complete if the L1 table is complete.
                if snapshots >= behind:
                    yield from self._read_snapshots(snapshots)
                snapshots = 0
                continue
            offset = heapq.heappop(offsets)
            table = (yield ImageRange(offset, cluster, f"its table at offset {offset} has {cluster} bytes")).data
            if offset in self._l2:
                self._record_summary(self._summary(table), self._l2[offset])
            if offset in self._blocks:
                self._record_block(self._blocks[offset], _used_bits(table))

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
            self._record_end(l1_offset + l1_size * 8, "last snapshot's L1 table")
            end = at + _SNAPSHOT_ENTRY + len(extra)
            self._record_end(end, "snapshot table")
            at = end + -end % 8

    def _summary(self, table: bytes) -> _L2Summary:
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
        return _L2Summary(end, packed, last, compressed)

    def _record_summary(self, summary: _L2Summary, is_last: bool) -> None:
        self._compressed = self._compressed or summary.compressed
        self._record_end(summary.end, "last cluster", summary.packed)
        if summary.last:
            self._record_end(summary.last + (self._rest if is_last else self._header.cluster), "last cluster")

    def _record_block(self, number: int, used_bits: int) -> None:
        """Record the last cluster that a refcount block counts."""
        if used_bits:
            width = 1 << self._header.refcount_order
            self._highest = max(self._highest, (number * self._header.cluster * 8 + used_bits - 1) // width)

    def _record_highest(self) -> None:
        """Record the end of the last counted cluster if it is behind all other units."""
        start = self._highest * self._header.cluster
        if not self._use_refcounts or start < self._end:
            return
        if self._compressed or self._bitmaps:  # neither compressed data nor a bitmap's table fills its cluster
            self._record_end(start + 1, "last cluster of a snapshot or bitmap")
            self.warnings.append(
                f"A snapshot or bitmap uses the last cluster, at offset {start}: its end was not checked,"
                " as such a cluster may be short"
            )
        else:
            self._record_end(start + min(self._rest, self._snapshot_rest), "last cluster of a snapshot or bitmap")


def _used_bits(block: bytes) -> int:
    """Return the bits of a refcount block before its trailing zeros."""
    filled = block.rstrip(b"\0")
    return 8 * (len(filled) - 1) + filled[-1].bit_length() if filled else 0


def _is_complete(data: bytes, cluster: int, zstd: bool) -> bool:
    """Return whether *data* decompresses to a complete cluster. A part of its last sector may be missing."""
    if zstd:
        # Whether a zstandard frame ends in *data* (RFC 8878, 3.1.1). Skip the blocks without decompression.
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
    try:
        return len(zlib.decompressobj(-12).decompress(data, cluster)) == cluster
    except zlib.error:
        return False
