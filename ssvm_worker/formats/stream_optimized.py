"""Follows a streamOptimized VMDK as it passes, marker by marker, and tells whether all of it came.

After the header and descriptor (see vmdk) the stream is a row of 512-byte-aligned items, little-endian:

    grain      0 LBA, sectors (u64) · 8 size of the data > 0 (u32) · 12 zlib data, padded to 512
    metadata   0 length, sectors (u64) · 8 zero (u32) · 12 kind (u32), padded to 512, then its payload:
               0 end of stream · 1 grain table · 2 grain directory · 3 footer · 4 progress

VMware's technical note "Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents". All of it is required
but the tables and the footer: they repeat what has been seen, no ESX host was at hand to see how strictly it writes
them, and a reader can rebuild them; so a contradiction there is a warning.
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
#: Bytes of a grain's marker; its data begins here.
_GRAIN_HEAD = 12
#: A table entry below this names no sector: 0 is unallocated, 1 a grain of zeros.
_FIRST_SECTOR = 2
#: Tables that a stream can have: its 32-bit sectors reach 2 TiB, and a table spans 32 MiB.
_MAX_TABLES = 65536


Take = Callable[[int, bytes, int], None]


class StreamOptimized:
    """An observer of chunks that verifies one streamOptimized VMDK.

    *capacity* (bytes) is what the disk must have, if the caller knows; every *inflate_every*-th grain is inflated and
    its Adler-32 checked, 0 for none. Where *take* is given, it gets each grain in place of that: its place on the disk
    (in grains), its zlib stream, and the bytes of a whole grain. It is to raise CorruptImage if that is no grain.
    Bytes: holds one sector, one table or one inflated grain; payloads that nobody wants are stepped over, not copied.
    Raises, from the call or from ``finish``: CorruptImage. The verdict does not depend on the chunks.
    """

    def __init__(
        self, where: str = "", capacity: int | None = None, inflate_every: int = 0, *, take: Take | None = None
    ) -> None:
        #: Bytes of the disk; 0 until the header has come.
        self.capacity = 0
        #: Bytes of the stream so far.
        self.size = 0
        #: Grains so far, and the bytes of the disk that they hold.
        self.grains = 0
        self.data_bytes = 0
        #: How far the stream has got, in bytes of the disk; equal to the capacity at the end.
        self.lba_bytes = 0
        #: Contradictions that cost no data.
        self.warnings: list[str] = []
        self._where = where
        self._expected = capacity
        self._inflate_every = 1 if take else inflate_every
        self._take = take
        self._tables = _Tables()
        self._header: SparseHeader | None = None
        self._ended = False
        # The walk: step over _skip bytes, collect _want bytes, hand them to _then, which sets these three anew.
        self._at = 0
        self._skip = 0
        self._want = SECTOR
        self._then: Callable[[bytes], None] = self._on_header
        self._held = bytearray()
        self._next_lba = 0
        self._grain_size = 0

    def __call__(self, chunk: bytes) -> None:
        """See the next bytes of the stream."""
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
        """Raise CorruptImage unless the stream has come to its end marker, and nothing more."""
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
        self._tables.size(header.gtes_per_gt)
        self._expect((header.overhead - 1) * SECTOR, _MARKER.size, self._on_marker)

    def _on_marker(self, piece: bytes) -> None:
        value, size, kind = _MARKER.unpack(piece)
        if size:
            self._on_grain(value, size, piece)
        else:
            self._on_metadata(value, kind)

    def _on_grain(self, lba: int, size: int, piece: bytes) -> None:
        """*piece* is the marker and the first 4 bytes of the grain's data."""
        if lba < self._next_lba or lba % self._grain_size or lba * SECTOR >= self.capacity:
            raise self._bad_grain(lba)
        if size > 2 * self._grain_size * SECTOR:  # qemu's bound on deflated data that has grown (block/vmdk.c)
            raise corrupt(f"The grain at sector {lba} has {size} bytes of data", self._where)
        self._tables.saw_grain(lba // self._grain_size, (self._at - _MARKER.size) // SECTOR)
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
        """Hand one grain over, or inflate it; a broken or overlong one is an error."""
        self._expect(0, _MARKER.size, self._on_marker)
        most = self._grain_size * SECTOR
        if self._take:
            self._take(lba // self._grain_size, data, most)
            return
        inflater = zlib.decompressobj()
        try:
            grain = inflater.decompress(data, most + 1)
        except zlib.error as error:
            raise corrupt(f"The grain at sector {lba} cannot be inflated: {error}", self._where) from error
        whole = min(most, self.capacity - lba * SECTOR)
        if not inflater.eof or not whole <= len(grain) <= most:
            raise corrupt(f"The grain at sector {lba} inflates to {len(grain)} bytes, not {most}", self._where)

    def _on_metadata(self, sectors: int, kind: int) -> None:
        pad, payload = SECTOR - _MARKER.size, sectors * SECTOR
        if kind == MARKER_EOS:
            self._expect(0, pad, self._on_end)
        elif kind == MARKER_FOOTER and sectors == 1:
            self._expect(pad, SECTOR, self._on_footer)
        elif kind == MARKER_GT and self._header and sectors == -(-self._header.gtes_per_gt * 4 // SECTOR):
            self._expect(pad, payload, self._on_table)
        elif kind == MARKER_GD and self._header and sectors == -(-self._header.tables * 4 // SECTOR):
            self._expect(pad, payload, self._on_directory)
        elif kind <= MARKER_PROGRESS:
            self._expect(pad + payload, _MARKER.size, self._on_marker)
        else:
            raise corrupt(f"There is no marker but bytes of another kind before offset {self._at}", self._where)

    def _on_table(self, payload: bytes) -> None:
        self._tables.saw_table((self._at - len(payload)) // SECTOR, payload)
        self._expect(0, _MARKER.size, self._on_marker)

    def _on_directory(self, payload: bytes) -> None:
        self._tables.saw_directory((self._at - len(payload)) // SECTOR, payload)
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
        self._expect(0, 0, self._on_more)

    def _on_more(self, _: bytes) -> None:
        raise corrupt(f"Bytes follow the end-of-stream marker, from offset {self._at} on", self._where)

    def _bad_grain(self, lba: int) -> Exception:
        if lba % self._grain_size or lba * SECTOR >= self.capacity:
            return corrupt(f"A grain claims sector {lba} of a disk of {self.capacity // SECTOR} sectors", self._where)
        return corrupt(f"The grain at sector {lba} comes again, or too late", self._where)


class _Tables:
    """Compares the tables of a stream with the grains that passed.

    Of every 32 MiB of disk one number is kept: the sum of the hashes of (place in the table, sector) of its grains,
    and the same of its table. Equal sums are equal tables, but for a chance of about 2^-60.
    """

    def __init__(self) -> None:
        self.footer: SparseHeader | None = None
        self._per_table = 0
        self._seen: dict[int, int] = {}
        self._tables: dict[int, int] = {}
        #: Where it lies and its bytes; a writer may give the redundant directory as well.
        self._directories: deque[tuple[int, bytes]] = deque(maxlen=2)

    def size(self, gtes_per_gt: int) -> None:
        """Say how many grains one table has."""
        self._per_table = gtes_per_gt

    def saw_grain(self, index: int, sector: int) -> None:
        table, place = divmod(index, self._per_table)
        self._seen[table] = self._seen.get(table, 0) + hash((place, sector))

    def saw_table(self, sector: int, payload: bytes) -> None:
        if len(self._tables) < 2 * _MAX_TABLES:
            entries = struct.unpack_from(f"<{self._per_table}I", payload)
            self._tables[sector] = sum(hash(pair) for pair in enumerate(entries) if pair[1] >= _FIRST_SECTOR)

    def saw_directory(self, sector: int, payload: bytes) -> None:
        self._directories.append((sector, payload))

    def contradictions(self, header: SparseHeader) -> list[str]:
        """What the tables say against the grains; empty if they agree."""
        gd_offset = header.gd_offset
        if gd_offset == GD_AT_END:
            if self.footer is None:
                return ["the header promises a footer, and there is none"]
            gd_offset = self.footer.gd_offset
        directory = next((payload for sector, payload in self._directories if sector == gd_offset), None)
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
