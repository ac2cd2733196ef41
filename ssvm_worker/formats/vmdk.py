"""VMDK, hosted sparse extents: VMware's technical note "Virtual Disk Format 5.0" (little-endian, 512-byte sectors).

     0  magic "KDMV"             28  descriptor, sector         72  unclean shutdown
     4  version                  36  descriptor, sectors        73  "\\n", " ", "\\r", "\\n"
     8  flags                    44  entries of a grain table   77  compression: 1 deflate
    12  capacity, sectors        48  redundant directory
    20  grain size, sectors      56  grain directory, sector; all ones: the footer, a copy of this header, says it

The descriptor is text: ``key=value`` lines, and one line for each extent: ``RW 4192256 SPARSE "disk.vmdk"``.

Safety: monolithicSparse and streamOptimized alone, no parent, one extent without a path, a footer that agrees.
Truncation: footer and end marker where the header promises them, else the grain directory, the grain tables and,
where the tables lie together, every grain begin inside the file.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from ssvm_worker.errors import UnsafeImage
from ssvm_worker.units import TiB

from .probe import MAX_RANGE, Facts, Range, Rules, corrupt, cut_short

MAGIC = b"KDMV"
SECTOR = 512
#: The grain directory's place is in the footer.
GD_AT_END = 0xFFFFFFFFFFFFFFFF
MARKER_EOS, MARKER_GT, MARKER_GD, MARKER_FOOTER, MARKER_PROGRESS = range(5)
COMPRESSED, MARKERS = 1 << 16, 1 << 17
#: vSphere's largest disk is 62 TiB.
_MAX_CAPACITY = 64 * TiB // SECTOR
_CREATE_TYPES = {"monolithicsparse": "monolithicSparse", "streamoptimized": "streamOptimized"}
_EXTENT = re.compile(r'(?:rw|rdonly|noaccess)\s+(\d+)\s+(\w+)(?:\s+"([^"]*)")?(?:\s+\d+)?')
_KEY = re.compile(r"([^\s=]+)\s*=\s*(.*)")
FLATTEN = "Convert it into one file: qemu-img convert -O vmdk -o subformat=streamOptimized IN OUT"
_LAYOUT = struct.Struct("<4sIIQQQQIQQQB4sH")


class SparseHeader(NamedTuple):
    """The first sector, and the footer."""

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
        """Grain tables that the capacity needs: entries of the grain directory."""
        return -(-self.capacity // (self.grain_size * self.gtes_per_gt))


def parse_header(sector: bytes, where: str) -> SparseHeader:
    """Read a header, with bounds on every number that a reader would allocate by; CorruptImage."""
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
        raise corrupt("The VMDK was mangled by a transfer in text mode", where)
    return header


def matches(head: bytes) -> bool:
    """Whether the image begins with a sparse header, or is a descriptor of whatever form."""
    return head.startswith(MAGIC) or _is_descriptor(head[:4096])


def _is_descriptor(text: bytes) -> bool:
    """Whether a reader would take this for a descriptor, whatever NULs, BOMs or other bytes stand in it.

    qemu's probe wants comments and blank lines, then ``version=`` (block/vmdk.c, vmdk_probe); VMware's reader wants
    the first comment.
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
    """Judge a VMDK; see probe."""
    if not head.startswith(MAGIC):
        raise _points_outside(head[:4096], where)
    header = parse_header(head[:SECTOR], where)
    if header.descriptor_offset != 1 or not 0 < header.descriptor_size <= 2048:
        raise UnsafeImage("The VMDK does not hold its own descriptor behind its header", where, FLATTEN)
    text = (yield Range(SECTOR, header.descriptor_size * SECTOR)).data
    create_type = check_descriptor(text, header, where)
    furthest = 0
    if header.gd_offset != GD_AT_END and header.tables * 4 <= MAX_RANGE:
        directory = (yield Range(header.gd_offset * SECTOR, header.tables * 4)).data
        listed = [sector for sector in struct.unpack(f"<{header.tables}I", directory) if sector]
        furthest = max(listed, default=0) * SECTOR
        if grain_tables := _span(listed, header):
            furthest = max(furthest, _last_grain((yield grain_tables).data, listed, header))
    facts = Facts("vmdk", header.capacity * SECTOR, {"create_type": create_type, "version": header.version})
    tail, size = yield facts
    if header.gd_offset == GD_AT_END:
        _check_end(header, tail, size, where)
    elif max(furthest + 4, header.overhead * SECTOR) > size:
        raise cut_short(f"it names offset {max(furthest, header.overhead * SECTOR)}", size, where)
    return facts


def _span(listed: list[int], header: SparseHeader) -> Range | None:
    """Where the grain tables lie, if writers have put them together as they all do."""
    if not listed:
        return None
    start, length = min(listed) * SECTOR, (max(listed) - min(listed)) * SECTOR + header.gtes_per_gt * 4
    behind = start >= header.gd_offset * SECTOR + header.tables * 4
    return Range(start, length) if behind and length <= MAX_RANGE else None


def _last_grain(tables: bytes, listed: list[int], header: SparseHeader) -> int:
    """The highest offset of a grain in these tables; 0 for none."""
    entries = struct.Struct(f"<{header.gtes_per_gt}I")
    first = min(listed)
    last: int = max(max(entries.unpack_from(tables, (sector - first) * SECTOR)) for sector in listed)
    return last * SECTOR


def check_descriptor(data: bytes, header: SparseHeader, where: str) -> str:
    """The create type of an embedded descriptor; UnsafeImage unless it describes this one file."""
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
    _check_parent(values, where)
    create_type = _create_type(values, where)
    _check_extents(extents, header, where)
    return create_type


def _create_type(values: dict[str, list[str]], where: str) -> str:
    types = values.get("createtype", [])
    if len(types) == 1 and types[0] in _CREATE_TYPES:
        return _CREATE_TYPES[types[0]]
    said = " and ".join(types)[:80] or "missing"
    raise UnsafeImage(f"The VMDK's createType is {said}; its data lies in other files, or is not taken", where, FLATTEN)


def _check_parent(values: dict[str, list[str]], where: str) -> None:
    hints = values.get("parentfilenamehint", [])
    if hints or any(cid != "ffffffff" for cid in values.get("parentcid", [])):
        parent = ascii(hints[0][:80]) if hints else "unnamed"
        raise UnsafeImage(f"The VMDK is a delta disk; its parent is {parent}", where, "Consolidate its snapshots first")


def _check_extents(extents: list[str], header: SparseHeader, where: str) -> None:
    match = _EXTENT.fullmatch(extents[0]) if len(extents) == 1 else None
    if not match:
        raise UnsafeImage(f"The VMDK describes {len(extents)} extents; one, itself, is taken", where, FLATTEN)
    name = match[3] or ""
    if match[2] != "sparse" or "/" in name or "\\" in name or name in ("", ".", ".."):
        raise UnsafeImage(f"The VMDK points outside itself: {extents[0][:120]!r}", where, FLATTEN)
    if not 0 <= header.capacity - int(match[1]) < header.grain_size:  # the header may be rounded up to a grain
        raise corrupt(f"The VMDK has {header.capacity} sectors, its descriptor says {match[1][:20]}", where)


def _points_outside(head: bytes, where: str) -> UnsafeImage:
    text = head.replace(b"\0", b"").decode("ascii", "replace").lower()
    extent = _EXTENT.search(text)
    named = f", here {extent[0][:120]!a}" if extent else ""
    return UnsafeImage(f"The VMDK is only a descriptor; its data lies in other files{named}", where, FLATTEN)


def _check_end(header: SparseHeader, tail: bytes, size: int, where: str) -> None:
    """Footer marker, footer, end marker: a reader takes the footer in place of the header, so both must agree."""
    markers = struct.pack("<QII", 1, 0, MARKER_FOOTER), bytes(SECTOR)
    if len(tail) < 3 * SECTOR or (tail[:16], tail[-SECTOR:]) != markers:
        raise cut_short("no footer and end-of-stream marker at its end", size, where)
    footer = parse_header(tail[SECTOR : 2 * SECTOR], where)
    if differing := differences(header, footer):
        raise UnsafeImage(f"The VMDK's footer contradicts its header: {', '.join(differing)}", where, FLATTEN)
    if footer.gd_offset * SECTOR + footer.tables * 4 > size:
        raise cut_short(f"its grain directory is at sector {footer.gd_offset}", size, where)


def differences(header: SparseHeader, footer: SparseHeader) -> list[str]:
    """The fields in which the two differ, but for the directories' places and the state of the writer."""
    free = {"gd_offset", "rgd_offset", "unclean", "overhead"}
    pairs = zip(SparseHeader._fields, header, footer, strict=True)
    return [name for name, ours, theirs in pairs if ours != theirs and name not in free]
