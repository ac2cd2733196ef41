"""Verify a streamOptimized VMDK marker by marker while it passes, and that nothing is missing.

After the header and descriptor (see vmdk) the stream is a row of 512-byte-aligned items, little-endian:

    grain      0 LBA, sectors (u64) · 8 size of the data > 0 (u32) · 12 zlib data, padded to 512
    metadata   0 length, sectors (u64) · 8 zero (u32) · 12 kind (u32), padded to 512, then its payload:
               0 end of stream · 1 grain table · 2 grain directory · 3 footer · 4 progress

VMware's technical note "Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents".

The format requires all of this. But a contradiction in the tables or in the footer is only a warning here. Tables and
footer repeat facts of the stream, and a reader can rebuild them. No ESX host was available to see how strictly it
writes them.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Callable

from .detect import corrupt, cut_short
from .vmdk import (
    COMPRESSED,
    GD_AT_END,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    MARKER_PROGRESS,
    MARKERS,
    SECTOR,
    SparseHeader,
    differences,
    parse_header,
)

_MARKER = struct.Struct("<QII")
#: Bytes of a grain's marker. The data of the grain follows.
_GRAIN_HEAD = 12
#: Smaller table entries name no sector: 0 is unallocated, 1 is a grain of zeros.
_FIRST_SECTOR = 2
#: The limit of tables in one stream. Its 32-bit sectors reach 2 TiB, and a table spans 32 MiB.
_MAX_TABLES = 65536
#: The largest sector that a table entry of 32 bits names.
_MAX_SECTOR = 0xFFFFFFFF


Take = Callable[[int, bytes, int], None]


class StreamOptimized:
    """Observer of chunks that verifies one streamOptimized VMDK.

    *capacity* is the expected size of the disk in bytes, if the caller knows it.
    *inflate_every* N: inflate each N-th grain and check its Adler-32. 0: inflate no grain.
    *take* gets each grain instead: its number on the disk, its zlib stream, and the bytes of a complete grain. It must
    raise CorruptImage if this is not a valid grain.

    Memory: one sector, one table or one inflated grain. Unneeded payloads are skipped without a copy.
    The call and ``finish`` raise CorruptImage. The verdict does not depend on the sizes of the chunks.
    """

    def __init__(
        self, where: str = "", capacity: int | None = None, inflate_every: int = 0, *, take: Take | None = None
    ) -> None:
        #: Bytes of the disk. 0 until the header has passed.
        self.capacity = 0
        #: Bytes of the stream so far.
        self.size = 0
        #: Grains so far, and their bytes on the disk.
        self.grains = 0
        self.data_bytes = 0
        #: Offset on the disk up to which the stream has passed. At the end it is the capacity.
        self.lba_bytes = 0
        #: Contradictions that lose no data.
        self.warnings: list[str] = []
        self._where = where
        self._expected = capacity
        self._inflate_every = 1 if take else inflate_every
        self._take = take
        self._tables = _Tables()
        self._header: SparseHeader | None = None
        self._ended = False
        # The parser skips _skip bytes, collects _want bytes, and passes them to _then. _then sets all three again.
        self._at = 0
        self._skip = 0
        self._want = SECTOR
        self._then: Callable[[bytes], None] = self._on_header
        self._held = bytearray()
        self._next_lba = 0
        self._grain_size = 0

    def __call__(self, chunk: bytes) -> None:
        """Check the next bytes of the stream."""
        at, end = 0, len(chunk)
        self.size += end
        while at < end:
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                at += step
                continue
            piece = chunk[at : at + self._want - len(self._held)]
            at += len(piece)
            if self._held or len(piece) < self._want:
                self._held += piece
                if len(self._held) < self._want:
                    return
                piece = bytes(self._held)
                self._held.clear()
            self._at += self._want
            self._then(piece)

    def finish(self) -> None:
        """Raise CorruptImage unless the stream has ended exactly with its end marker."""
        if not self.size:
            raise cut_short("the stream is empty", 0, self._where)
        if not self._ended or self._want:
            raise cut_short("there is no end-of-stream marker", self.size, self._where)
        assert self._header is not None
        self.warnings += self._tables.contradictions(self._header)

    def _expect(self, skip: int, want: int, then: Callable[[bytes], None]) -> None:
        self._skip, self._want, self._then = skip, want, then
        self._at += skip

    def _on_header(self, sector: bytes) -> None:
        header = parse_header(sector, self._where)
        if header.flags & (COMPRESSED | MARKERS) != COMPRESSED | MARKERS or header.compression != 1:
            raise corrupt(
                f"The VMDK is not streamOptimized: flags {header.flags:#x}, compression {header.compression}",
                self._where,
            )
        if header.overhead < max(1, header.descriptor_offset + header.descriptor_size) or header.overhead >> 32:
            raise corrupt(f"The VMDK's data begins at sector {header.overhead}, inside its header", self._where)
        self.capacity = header.capacity * SECTOR
        rounding = header.grain_size * SECTOR  # a writer may round its capacity up to a whole grain
        if self._expected is not None and not 0 <= self.capacity - self._expected < rounding:
            raise corrupt(f"The disk has {self._expected} bytes, the stream says {self.capacity}", self._where)
        self._header = header
        self._grain_size = header.grain_size
        self._tables.per_table = header.gtes_per_gt
        self._expect((header.overhead - 1) * SECTOR, _MARKER.size, self._on_marker)

    def _on_marker(self, piece: bytes) -> None:
        value, size, kind = _MARKER.unpack(piece)
        if size:
            self._on_grain(value, size, piece)
        else:
            pad, payload = SECTOR - _MARKER.size, value * SECTOR
            if kind == MARKER_EOS:
                self._expect(0, pad, self._on_end)
            elif kind == MARKER_FOOTER and value == 1:
                self._expect(pad, SECTOR, self._on_footer)
            elif kind == MARKER_GT and self._header and value == -(-self._header.gtes_per_gt * 4 // SECTOR):
                self._expect(pad, payload, self._on_table)
            elif kind == MARKER_GD and self._header and value == -(-self._header.tables * 4 // SECTOR):
                self._expect(pad, payload, self._on_directory)
            elif kind <= MARKER_PROGRESS:
                self._expect(pad + payload, _MARKER.size, self._on_marker)
            else:
                raise corrupt(f"The bytes before offset {self._at} are not a marker", self._where)

    def _on_grain(self, lba: int, size: int, piece: bytes) -> None:
        """Check one grain. *piece* is its marker and the first 4 bytes of its data."""
        if lba < self._next_lba or lba % self._grain_size or lba * SECTOR >= self.capacity:
            raise self._grain_error(lba)
        if size > 2 * self._grain_size * SECTOR:  # qemu's bound on deflated data that has grown (block/vmdk.c)
            raise corrupt(f"The grain at sector {lba} has {size} bytes of data", self._where)
        self._tables.add_grain(lba // self._grain_size, (self._at - _MARKER.size) // SECTOR)
        self._next_lba = lba + self._grain_size
        self.lba_bytes = min(self._next_lba * SECTOR, self.capacity)
        self.data_bytes += self.lba_bytes - lba * SECTOR
        self.grains += 1
        rest = -(-(_GRAIN_HEAD + size) // SECTOR) * SECTOR - _MARKER.size
        if self._inflate_every and self.grains % self._inflate_every == 0:
            start = piece[_GRAIN_HEAD:]
            self._expect(0, rest, lambda data: self._on_grain_data(lba, (start + data)[:size]))
        else:
            self._expect(rest, _MARKER.size, self._on_marker)

    def _on_grain_data(self, lba: int, data: bytes) -> None:
        """Pass a grain to the caller, or inflate it. Raises CorruptImage for a broken or too long one."""
        self._expect(0, _MARKER.size, self._on_marker)
        grain_bytes = self._grain_size * SECTOR
        if self._take:
            self._take(lba // self._grain_size, data, grain_bytes)
            return
        inflater = zlib.decompressobj()
        try:
            grain = inflater.decompress(data, grain_bytes + 1)
        except zlib.error as error:
            raise corrupt(f"The grain at sector {lba} cannot be inflated: {error}", self._where) from error
        min_bytes = min(grain_bytes, self.capacity - lba * SECTOR)
        if not inflater.eof or not min_bytes <= len(grain) <= grain_bytes:
            what = f"The grain at sector {lba} inflates to {len(grain)} bytes, not {grain_bytes}"
            raise corrupt(what, self._where)

    def _on_table(self, payload: bytes) -> None:
        self._tables.add_table((self._at - len(payload)) // SECTOR, payload)
        self._expect(0, _MARKER.size, self._on_marker)

    def _on_directory(self, payload: bytes) -> None:
        self._tables.directories.append(((self._at - len(payload)) // SECTOR, payload))
        self._expect(0, _MARKER.size, self._on_marker)

    def _on_footer(self, sector: bytes) -> None:
        footer = parse_header(sector, self._where)
        assert self._header is not None
        if differing := differences(self._header, footer):
            self.warnings = [f"the footer contradicts the header: {', '.join(differing)}"]
        self._tables.footer = footer
        self._expect(0, _MARKER.size, self._on_marker)

    def _on_end(self, _: bytes) -> None:
        """End the stream. The padding has no meaning: VMware's own writer leaves bytes of older markers there."""
        self._ended = True
        self.lba_bytes = self.capacity
        self._expect(0, 0, self._on_trailing_byte)

    def _on_trailing_byte(self, _: bytes) -> None:
        raise corrupt(f"Bytes follow the end-of-stream marker, from offset {self._at} on", self._where)

    def _grain_error(self, lba: int) -> Exception:
        if lba % self._grain_size or lba * SECTOR >= self.capacity:
            return corrupt(f"A grain claims sector {lba} of a disk of {self.capacity // SECTOR} sectors", self._where)
        return corrupt(f"The grain at sector {lba} is repeated, or out of order", self._where)


class _Tables:
    """Comparison of the tables of a stream with its grains.

    For each 32 MiB of disk it keeps two sums: of the hashes of (index in the table, sector) of the grains, and of the
    entries of the table. Equal sums mean equal tables, with a chance of an error of about 2^-60.
    """

    def __init__(self) -> None:
        self.footer: SparseHeader | None = None
        #: Grains of one table.
        self.per_table = 0
        #: The reason why the tables cannot be compared.
        self._not_compared = ""
        self._seen: dict[int, int] = {}
        self._tables: dict[int, int] = {}
        #: Sector and bytes. A writer may write the redundant directory too.
        self.directories: deque[tuple[int, bytes]] = deque(maxlen=2)

    def add_grain(self, index: int, sector: int) -> None:
        table, place = divmod(index, self.per_table)
        if sector > _MAX_SECTOR:
            self._not_compared = "the stream has more than 2 TiB"
        self._seen[table] = self._seen.get(table, 0) + hash((place, sector))

    def add_table(self, sector: int, payload: bytes) -> None:
        if len(self._tables) >= 2 * _MAX_TABLES:
            self._not_compared = f"there are more than {2 * _MAX_TABLES}"
        else:
            entries = struct.unpack_from(f"<{self.per_table}I", payload)
            self._tables[sector] = sum(hash(pair) for pair in enumerate(entries) if pair[1] >= _FIRST_SECTOR)

    def contradictions(self, header: SparseHeader) -> list[str]:
        """Return the contradictions between tables and grains."""
        gd_offset = header.gd_offset
        if self._not_compared:
            return [f"the grain tables were not compared with the grains, because {self._not_compared}"]
        if gd_offset < header.overhead:
            return []  # the tables are in the head, which is skipped: other writers than ESXi place them there
        if gd_offset == GD_AT_END:
            if self.footer is None:
                return ["the header promises a footer, and there is none"]
            gd_offset = self.footer.gd_offset
        directory = next((payload for sector, payload in self.directories if sector == gd_offset), None)
        if directory is None:
            return [f"there is no grain directory at sector {gd_offset}"]
        listed = struct.unpack_from(f"<{header.tables}I", directory)
        wrong = [
            number
            for number, sector in enumerate(listed)
            if (self._tables.get(sector) if sector >= _FIRST_SECTOR else 0) != self._seen.get(number, 0)
        ]
        return (
            [f"{len(wrong)} of {len(listed)} grain tables contradict the grains, first number {wrong[0]}"]
            if wrong
            else []
        )
