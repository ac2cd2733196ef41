r"""Check VMDK, hosted sparse extents: VMware's "Virtual Disk Format 5.0" (little-endian, 512-byte sectors).

     0  magic "KDMV"             28  descriptor, sector         72  unclean shutdown
     4  version                  36  descriptor, sectors        73  "\n", " ", "\r", "\n"
     8  flags                    44  entries of a grain table   77  compression: 1 deflate
    12  capacity, sectors        48  redundant directory
    20  grain size, sectors      56  grain directory, sector; all ones: the footer, a copy of this header, says it

The descriptor is text: ``key=value`` lines, and one line for each extent: ``RW 4192256 SPARSE "disk.vmdk"``.

Safety: only monolithicSparse and streamOptimized, no parent, one extent without a path, a footer that agrees.
Truncation: if the header announces a footer, footer and end marker must exist. Otherwise the grain directories, each
grain table and each grain must be completely inside the file. The grain at the end of the disk may be as short as the
end of the disk.
Only the first 16 bytes of a marker count, because VMware's own writer leaves other bytes in the padding.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Generator
from typing import NamedTuple

from ssvm_worker.errors import TooLarge, UnsafeImage
from ssvm_worker.units import TiB

from .detect import ImageBytes, ImageFacts, ImageRange, Rules, corrupt, cut_short, in_pieces

MAGIC = b"KDMV"
SECTOR = 512
#: Value of the header's field if only the footer has the offset of the grain directory.
GD_AT_END = 0xFFFFFFFFFFFFFFFF
MARKER_EOS, MARKER_GT, MARKER_GD, MARKER_FOOTER, MARKER_PROGRESS = range(5)
REDUNDANT, COMPRESSED, MARKERS = 1 << 1, 1 << 16, 1 << 17
#: The largest disk of vSphere has 62 TiB.
_MAX_CAPACITY = 64 * TiB // SECTOR
#: Table entries up to this one name no sector: 0 is unallocated, 1 is a grain of zeros.
ZERO_GRAIN = 1
#: Bytes of a grain's marker: its sector (u64) and the length of its data (u32). The data follows.
_GRAIN_HEAD = 12
#: The limit of runs of adjacent grain tables. A table spans 32 MiB of the disk, and the sectors of a file reach 2 TiB.
_MAX_RUNS = 1 << 17
#: The bytes of a marker that count: value (u64), size (u32), kind (u32). The rest of its sector is padding.
_MARKER = struct.Struct("<QII")
_CREATE_TYPES = {"monolithicsparse": "monolithicSparse", "streamoptimized": "streamOptimized"}
_EXTENT = re.compile(r'(?:rw|rdonly|noaccess)\s+(\d+)\s+(\w+)(?:\s+"([^"]*)")?(?:\s+\d+)?')
_KEY = re.compile(r"([^\s=]+)\s*=\s*(.*)")
FLATTEN = "Convert it to one file: qemu-img convert -O vmdk -o subformat=streamOptimized IN OUT"
_LAYOUT = struct.Struct("<4sIIQQQQIQQQB4sH")


class SparseHeader(NamedTuple):
    """Fields of the first sector, and of the footer."""

    magic: bytes
    version: int
    flags: int
    capacity: int
    grain_size: int
    descriptor_offset: int
    descriptor_size: int
    gtes_per_gt: int
    rgd_offset: int
    gd_offset: int
    overhead: int
    unclean: int
    newlines: bytes
    compression: int

    @property
    def tables(self) -> int:
        """Return the number of grain tables that the capacity needs. The grain directory has one entry for each."""
        return -(-self.capacity // (self.grain_size * self.gtes_per_gt))


def parse_header(sector: bytes, where: str) -> SparseHeader:
    """Parse a header, and check each number by which a reader would allocate memory. Raises CorruptImage."""
    if len(sector) < _LAYOUT.size:
        raise cut_short("a VMDK header has 512 bytes", len(sector), where)
    header = SparseHeader(*_LAYOUT.unpack_from(sector))
    if header.magic != MAGIC or header.version not in (1, 2, 3):
        raise corrupt(f"This is no VMDK header of version 1 to 3: {header.magic!r}, {header.version}", where)
    if not 0 < header.capacity <= _MAX_CAPACITY:
        raise corrupt(f"The VMDK has a capacity of {header.capacity} sectors", where)
    grain = header.grain_size
    if not 8 <= grain <= 4096 or grain & (grain - 1) or not 0 < header.gtes_per_gt <= 4096:
        raise corrupt(f"The VMDK has grains of {grain} sectors, {header.gtes_per_gt} in a table", where)
    if header.flags & 1 and header.newlines != b"\n \r\n":
        raise corrupt("The VMDK was damaged by a transfer in text mode", where)
    return header


def matches(head: bytes) -> bool:
    """Return whether the image begins with a sparse header, or is a descriptor in any form."""
    return head.startswith(MAGIC) or _is_descriptor(head[:4096])


def _is_descriptor(text: bytes) -> bool:
    """Return whether any reader would accept these bytes as a descriptor, even with NULs, BOMs or other bytes in it.

    qemu's probe accepts comments and blank lines before ``version=`` (block/vmdk.c, vmdk_probe). VMware's reader
    requires the first comment.
    """
    plain = text.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower()
    if not plain[:1].isascii() or (plain[:1] and not plain[:1].decode().isprintable()):
        return False
    if plain.startswith(b"# disk descriptor") or b"createtype" in plain:
        return True
    lines = (line.strip() for line in plain.split(b"\n"))
    first = next((line for line in lines if line and not line.startswith(b"#")), b"")
    return first.startswith(b"version=")


def rules(head: bytes, where: str) -> Rules:
    """Check a VMDK. See ``detect``."""
    if not head.startswith(MAGIC):
        raise _only_a_descriptor(head[:4096], where)
    header = parse_header(head[:SECTOR], where)
    if header.descriptor_offset != 1 or not 0 < header.descriptor_size <= 2048:
        raise UnsafeImage("The VMDK does not hold its own descriptor after its header", where, FLATTEN)
    text = (yield ImageRange(SECTOR, header.descriptor_size * SECTOR)).data
    create_type = check_descriptor(text, header, where)
    end = header.overhead * SECTOR
    if header.gd_offset != GD_AT_END:
        end = max(end, (yield from _last_unit(header, where)))
        if header.flags & REDUNDANT:
            end = max(end, header.rgd_offset * SECTOR + header.tables * 4)
    facts = ImageFacts("vmdk", header.capacity * SECTOR, {"create_type": create_type, "version": header.version})
    tail, size = yield facts
    if header.gd_offset == GD_AT_END:
        _check_end(header, tail, size, where)
    elif end > size:
        raise cut_short(f"its last grain or table ends at offset {end}", size, where)
    return facts


def _last_unit(header: SparseHeader, where: str) -> Generator[ImageRange | ImageFacts, ImageBytes, int]:
    """Return the end of the last grain or grain table."""
    runs, last_table = yield from _grain_tables(header, where)
    length = header.gtes_per_gt * 4
    entries = struct.Struct(f"<{header.gtes_per_gt}I")
    last_grain = (header.capacity - 1) // header.grain_size
    rest = header.capacity - last_grain * header.grain_size
    # In sectors: the start of the last grain, and the largest end of a grain.
    last_start = end = 0
    for first, count in sorted(runs):
        for number in range(count):
            sector = first + number * _sectors(length)
            why = f"its grain table at sector {sector} has {length} bytes"
            table = (yield ImageRange(sector * SECTOR, length, why)).data
            if table.count(0) == length:
                continue
            grains = list(entries.unpack(table))
            last_start = max(last_start, *grains)
            if sector == last_table and (last := grains[last_grain % header.gtes_per_gt]) > ZERO_GRAIN:
                end = max(end, last + rest)
                grains[last_grain % header.gtes_per_gt] = 0
            if (last := max(grains)) > ZERO_GRAIN:
                end = max(end, last + header.grain_size)
    if not header.flags & COMPRESSED or last_start <= ZERO_GRAIN:
        return end * SECTOR
    if not header.flags & MARKERS:
        raise corrupt("The VMDK has compressed grains without markers, so their lengths are unknown", where)
    last_run_table = max((first + (count - 1) * _sectors(length) for first, count in runs), default=0)
    if last_start < last_run_table:  # a complete table follows the last grain
        return 0
    why = f"its last grain is at sector {last_start}"
    size: int = struct.unpack("<QI", (yield ImageRange(last_start * SECTOR, _GRAIN_HEAD, why)).data)[1]
    return last_start * SECTOR + _GRAIN_HEAD + size


def _grain_tables(
    header: SparseHeader, where: str
) -> Generator[ImageRange | ImageFacts, ImageBytes, tuple[list[list[int]], int]]:
    """Return the grain tables as runs of (first sector, number of adjacent tables), and the sector of the last table.

    Writers place all tables next to each other, so a run needs no more memory than one table.
    """
    runs: list[list[int]] = []
    length, last = _sectors(header.gtes_per_gt * 4), 0
    why = f"its grain directory has {header.tables} entries at sector {header.gd_offset}"
    for piece in in_pieces(header.gd_offset * SECTOR, header.tables * 4, why, 4):
        for (sector,) in struct.iter_unpack("<I", (yield piece).data):
            last = sector
            if runs and sector == runs[-1][0] + runs[-1][1] * length:
                runs[-1][1] += 1
            elif sector:
                runs.append([sector, 1])
        if len(runs) > _MAX_RUNS:
            what = f"The VMDK has its grain tables in more than {_MAX_RUNS} places, which cannot be checked"
            raise TooLarge(what, where, FLATTEN)
    return runs, last


def _sectors(size: int) -> int:
    """Return the whole sectors for *size* bytes."""
    return -(-size // SECTOR)


def check_descriptor(data: bytes, header: SparseHeader, where: str) -> str:
    """Return the create type of an embedded descriptor. Raises UnsafeImage unless it describes only this file."""
    try:
        lines = [line.strip() for line in data.split(b"\0")[0].decode("ascii").lower().splitlines()]
    except UnicodeDecodeError as error:
        raise UnsafeImage("The VMDK descriptor holds bytes that are not ASCII", where, FLATTEN) from error
    extents = [line for line in lines if line.startswith(("rw", "rdonly", "noaccess"))]
    values: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#") and line not in extents:
            match = _KEY.fullmatch(line)
            if not match:
                raise UnsafeImage(f"The VMDK descriptor has a line of no known form: {line[:80]!r}", where, FLATTEN)
            values.setdefault(match[1], []).append(match[2].strip('"'))
    hints = values.get("parentfilenamehint", [])
    if hints or any(cid != "ffffffff" for cid in values.get("parentcid", [])):
        parent = ascii(hints[0][:80]) if hints else "unnamed"
        raise UnsafeImage(f"The VMDK is a delta disk; its parent is {parent}", where, "Consolidate its snapshots first")
    create_type = _create_type(values, where)
    _check_extents(extents, header, where)
    return create_type


def _create_type(values: dict[str, list[str]], where: str) -> str:
    types = values.get("createtype", [])
    if len(types) == 1 and types[0] in _CREATE_TYPES:
        return _CREATE_TYPES[types[0]]
    found = " and ".join(types)[:80] or "missing"
    what = f"The VMDK's createType is {found}. Its data is in other files, or the type is not supported"
    raise UnsafeImage(what, where, FLATTEN)


def _check_extents(extents: list[str], header: SparseHeader, where: str) -> None:
    match = _EXTENT.fullmatch(extents[0]) if len(extents) == 1 else None
    if not match:
        raise UnsafeImage(f"The VMDK describes {len(extents)} extents. Only one, itself, is allowed", where, FLATTEN)
    name = match[3] or ""
    if match[2] != "sparse" or "/" in name or "\\" in name or name in ("", ".", ".."):
        raise UnsafeImage(f"The VMDK points outside itself: {extents[0][:120]!r}", where, FLATTEN)
    if not 0 <= header.capacity - int(match[1]) < header.grain_size:  # the header may be rounded up to a grain
        raise corrupt(f"The VMDK has {header.capacity} sectors, its descriptor says {match[1][:20]}", where)


def _only_a_descriptor(head: bytes, where: str) -> UnsafeImage:
    text = head.replace(b"\0", b"").decode("ascii", "replace").lower()
    extent = _EXTENT.search(text)
    named = f", here {extent[0][:120]!a}" if extent else ""
    return UnsafeImage(f"The VMDK is only a descriptor. Its data is in other files{named}", where, FLATTEN)


def _check_end(header: SparseHeader, tail: bytes, size: int, where: str) -> None:
    """Check footer marker, footer and end marker. Readers use the footer instead of the header, so both must agree."""
    markers = _MARKER.pack(1, 0, MARKER_FOOTER), _MARKER.pack(0, 0, MARKER_EOS)
    if len(tail) < 3 * SECTOR or (tail[: _MARKER.size], tail[-SECTOR:][: _MARKER.size]) != markers:
        raise cut_short("no footer and end-of-stream marker at its end", size, where)
    footer = parse_header(tail[SECTOR : 2 * SECTOR], where)
    if differing := differences(header, footer):
        raise UnsafeImage(f"The VMDK's footer contradicts its header: {', '.join(differing)}", where, FLATTEN)
    if footer.gd_offset * SECTOR + footer.tables * 4 > size:
        raise cut_short(f"its grain directory is at sector {footer.gd_offset}", size, where)


def without_padding(tail: bytes) -> bytes:
    """Return the last three sectors of a stream, with zeros in the padding of the footer marker and end marker."""
    pad = bytes(SECTOR - _MARKER.size)
    return tail[: _MARKER.size] + pad + tail[SECTOR : 2 * SECTOR] + tail[2 * SECTOR :][: _MARKER.size] + pad


def differences(header: SparseHeader, footer: SparseHeader) -> list[str]:
    """Return the names of the fields that differ. Offsets of directories and the writer's state do not count."""
    free = {"gd_offset", "rgd_offset", "unclean", "overhead"}
    pairs = zip(SparseHeader._fields, header, footer, strict=True)
    return [name for name, ours, theirs in pairs if ours != theirs and name not in free]
