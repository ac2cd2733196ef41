"""Write a streamOptimized VMDK as a stream, without seeking back, in the form that ESX hosts send and accept.

    header · descriptor · grains of 32 MiB of disk · their grain table · … · grain directory · footer · end of stream

Each table follows its grains, so only one table is in memory. Layout: see ``vmdk`` and ``stream_optimized``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

from ssvm_worker.errors import TooLarge
from ssvm_worker.formats.extents import Extent, check_order, merge_chunks
from ssvm_worker.formats.vmdk import (
    COMPRESSED,
    GD_AT_END,
    MAGIC,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    MARKERS,
    SECTOR,
    SparseHeader,
)
from ssvm_worker.streaming.isal_zlib import deflate
from ssvm_worker.units import KiB, TiB

GRAIN = 64 * KiB
_TABLE = 512
_OVERHEAD = GRAIN // SECTOR
#: Head of a grain: its sector, and the bytes of its data.
_GRAIN_HEAD = struct.Struct("<QI")
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_DESCRIPTOR = """# Disk DescriptorFile
version=1
CID={cid:08x}
parentCID=ffffffff
createType="streamOptimized"

RW {sectors} SPARSE "{name}"

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.virtualHWVersion = "13"
"""


def stream_optimized(extents: Iterable[Extent], capacity: int, name: str) -> Iterator[bytes]:
    """Return the chunks of a streamOptimized VMDK of *capacity* bytes. Each extent is a whole grain of 64 KiB.

    The same extents give the same bytes. Raises CorruptImage for extents out of order. Raises TooLarge for a stream
    beyond 2 TiB, which its 32-bit sectors cannot address. Memory: one grain table, and 4 bytes for each 32 MiB of disk.
    """
    grains = ((offset, deflate(data.ljust(GRAIN, b"\0"))) for offset, data in check_order(extents, capacity, name))
    return stream_of_grains(grains, capacity, name)


def stream_of_grains(
    grains: Iterable[tuple[int, bytes]], capacity: int, name: str, grain_size: int = GRAIN
) -> Iterator[bytes]:
    """Do the same for grains of *grain_size* that are zlib streams already. Their offsets must rise."""
    return merge_chunks(_Writer(capacity, name, grain_size).image(grains))


def stream_size(lengths: Iterable[tuple[int, int]], capacity: int, grain_size: int = GRAIN) -> int:
    """Return the bytes of the stream that ``stream_of_grains`` makes from grains of these (offset, length)."""
    size, tables, last = _OVERHEAD * SECTOR, 0, -1
    for offset, length in lengths:
        size += _round_up(_GRAIN_HEAD.size + length)
        table = offset // (_TABLE * grain_size)
        tables, last = tables + (table != last), table
    directory = _round_up(4 * _tables_of(-(-capacity // SECTOR), grain_size))
    return size + tables * (SECTOR + 4 * _TABLE) + SECTOR + directory + 2 * SECTOR + SECTOR


def _tables_of(sectors: int, grain_size: int) -> int:
    """Return the number of grain tables of a disk."""
    return -(-sectors // (_TABLE * grain_size // SECTOR))


class _Writer:
    def __init__(self, capacity: int, name: str, grain_size: int) -> None:
        self._name = name
        self._grain_size = grain_size
        self._sectors = -(-capacity // SECTOR)
        #: Sectors written.
        self._at = 0
        self._directory = [0] * _tables_of(self._sectors, grain_size)
        self._table = [0] * _TABLE
        self._number = -1

    def image(self, grains: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
        yield self._advance(self._header(GD_AT_END) + self._descriptor())
        for offset, data in grains:
            number, place = divmod(offset // self._grain_size, _TABLE)
            if number != self._number:
                yield from self._end_table()
                self._number = number
            self._table[place] = self._at
            yield self._advance(_padded(_GRAIN_HEAD.pack(offset // SECTOR, len(data)) + data))
        yield from self._end_table()
        directory = _padded(struct.pack(f"<{len(self._directory)}I", *self._directory))
        directory_at = self._at + 1
        yield self._advance(_marker(len(directory) // SECTOR, MARKER_GD) + directory)
        yield self._advance(_marker(1, MARKER_FOOTER) + self._header(directory_at))
        yield self._advance(_marker(0, MARKER_EOS))

    def _advance(self, piece: bytes) -> bytes:
        """Count the sectors of *piece* and return it."""
        self._at += len(piece) // SECTOR
        if self._at >> 32:
            what = f"The stream would exceed {2 * TiB} bytes, the limit of a VMDK"
            raise TooLarge(what, self._name, "Restore it as raw or qcow2")
        return piece

    def _end_table(self) -> Iterator[bytes]:
        if self._number >= 0:
            self._directory[self._number] = self._at + 1
            yield self._advance(_marker(4, MARKER_GT) + struct.pack(f"<{_TABLE}I", *self._table))
            self._table = [0] * _TABLE

    def _header(self, directory_at: int) -> bytes:
        fields = SparseHeader(
            magic=MAGIC,
            version=3,
            flags=1 | COMPRESSED | MARKERS,
            capacity=self._sectors,
            grain_size=self._grain_size // SECTOR,
            descriptor_offset=1,
            descriptor_size=20,
            gtes_per_gt=_TABLE,
            rgd_offset=0,
            gd_offset=directory_at,
            overhead=_OVERHEAD,
            unclean=0,
            newlines=b"\n \r\n",
            compression=1,
        )
        return _padded(_HEADER.pack(*fields))

    def _descriptor(self) -> bytes:
        values = {"sectors": self._sectors, "name": self._name, "cylinders": max(1, self._sectors // (255 * 63))}
        text = _DESCRIPTOR.format(cid=zlib.crc32(self._name.encode()), **values)
        return text.encode().ljust(_OVERHEAD * SECTOR - SECTOR, b"\0")


def _marker(sectors: int, kind: int) -> bytes:
    return _padded(struct.pack("<QII", sectors, 0, kind))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SECTOR)


def _round_up(size: int) -> int:
    """Round up to whole sectors."""
    return size + -size % SECTOR
