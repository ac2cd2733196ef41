"""VHDX: [MS-VHDX], https://learn.microsoft.com/openspecs/windows_protocols/ms-vhdx/ (little-endian).

    0          "vhdxfile"
    192 KiB    region table: "regi" · 8 number of entries · 16 entries of 32: GUID, offset, length (u32), required (u32)
    ≥ 1 MiB    metadata region: "metadata" · 10 number · 32 entries of 32: GUID, offset from here (u32), length (u32)
               items: file parameters (block size u32, flags u32, bit 1 has parent) · virtual disk size (u64)

Safety: no parent. Truncation: every region lies inside the file, and every block begins there.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Generator
from typing import NamedTuple

from ssvm_worker.errors import UnknownFormat, UnsafeImage
from ssvm_worker.units import KiB, MiB, TiB

from .probe import Facts, Range, Rules, Seen, corrupt, cut_short

MAGIC = b"vhdxfile"
_REGIONS_AT, _TABLE = 192 * KiB, 64 * KiB
_MAX_ENTRIES = 2047
#: [MS-VHDX] 2.6.2.2: the largest virtual disk.
_MAX_SIZE = 64 * TiB
_BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_VIRTUAL_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_HAS_PARENT = 2
#: States of a block from here on (6 fully, 7 partially present) name its place; others may name a stale one. 2.5.1.1.
_PRESENT = 6
_OFFSET_MASK = 0xFFFFFFFFFFF00000


class _Entry(NamedTuple):
    offset: int
    length: int


def matches(head: bytes) -> bool:
    """Whether the image begins as a VHDX does."""
    return head.startswith(MAGIC)


def rules(head: bytes, where: str) -> Rules:
    """Judge a VHDX; see probe."""
    if len(head) < _REGIONS_AT + _TABLE:
        raise cut_short("the headers of a VHDX take 256 KiB", len(head), where)
    regions = _region_table(head[_REGIONS_AT : _REGIONS_AT + _TABLE], where)
    at, bat, furthest = regions[_METADATA].offset, regions[_BAT], 0
    if bat.offset < at:
        furthest = yield from _furthest_block(bat)
    block, flags, virtual_size = yield from _metadata(at, where)
    if bat.offset > at:
        furthest = yield from _furthest_block(bat)
    facts = Facts("vhdx", virtual_size, {"subformat": "fixed" if flags & 1 else "dynamic", "block_size": block})
    size = (yield facts).size
    for region in regions.values():
        if region.offset + region.length > size:
            raise cut_short(f"a region goes to offset {region.offset + region.length}", size, where)
    if furthest >= size:
        raise cut_short(f"a block lies at offset {furthest}", size, where)
    return facts


def _furthest_block(bat: _Entry) -> Generator[Range | Facts, Seen, int]:
    """The highest offset in the first MiB of the block table: of 131072 blocks, 1 TiB and more."""
    table = (yield Range(bat.offset, min(bat.length, MiB) // 8 * 8)).data
    present = (entry for (entry,) in struct.iter_unpack("<Q", table) if entry & 7 >= _PRESENT)
    return max((entry & _OFFSET_MASK for entry in present), default=0)


def _metadata(at: int, where: str) -> Generator[Range | Facts, Seen, tuple[int, int, int]]:
    """Block size, flags and virtual size out of the metadata region."""
    items = _metadata_table((yield Range(at, _TABLE)).data, where)
    values: dict[uuid.UUID, bytes] = {}
    for guid in sorted((_FILE_PARAMETERS, _VIRTUAL_SIZE), key=lambda each: items[each].offset):
        values[guid] = (yield Range(at + items[guid].offset, 8)).data
    block, flags = struct.unpack("<II", values[_FILE_PARAMETERS])
    virtual_size: int = struct.unpack("<Q", values[_VIRTUAL_SIZE])[0]
    if flags & _HAS_PARENT:
        raise _differencing(where)
    if not 0 < virtual_size <= _MAX_SIZE:
        raise corrupt(f"The VHDX says that it has {virtual_size} bytes", where)
    return block, flags, virtual_size


def _region_table(table: bytes, where: str) -> dict[uuid.UUID, _Entry]:
    count = struct.unpack_from("<I", table, 8)[0]
    if not table.startswith(b"regi") or count > _MAX_ENTRIES:
        raise corrupt("The VHDX has no sound region table", where)
    regions: dict[uuid.UUID, _Entry] = {}
    for at in range(16, 16 + 32 * count, 32):
        guid = uuid.UUID(bytes_le=table[at : at + 16])
        offset, length, required = struct.unpack_from("<QII", table, at + 16)
        if required and guid not in (_BAT, _METADATA):
            raise UnknownFormat(
                f"The VHDX needs an unknown region, {guid}", where, "Convert it with the tool that made it"
            )
        if offset < MiB or offset % MiB or offset >> 60 or guid in regions:
            raise corrupt(f"The VHDX has a region at offset {offset}, or one of a kind twice", where)
        regions[guid] = _Entry(offset, length)
    if not {_BAT, _METADATA} <= regions.keys():
        raise corrupt("The VHDX lacks a block table or its metadata", where)
    return regions


def _metadata_table(table: bytes, where: str) -> dict[uuid.UUID, _Entry]:
    count = struct.unpack_from("<H", table, 10)[0]
    if not table.startswith(b"metadata") or count > _MAX_ENTRIES:
        raise corrupt("The VHDX has no sound metadata table", where)
    items: dict[uuid.UUID, _Entry] = {}
    for at in range(32, 32 + 32 * count, 32):
        guid = uuid.UUID(bytes_le=table[at : at + 16])
        items[guid] = _Entry(*struct.unpack_from("<II", table, at + 16))
    if _PARENT_LOCATOR in items:
        raise _differencing(where)
    for guid in (_FILE_PARAMETERS, _VIRTUAL_SIZE):
        if guid not in items or items[guid].offset < _TABLE or items[guid].length < 8:
            raise corrupt("The VHDX lacks its file parameters or its virtual size", where)
    return items


def _differencing(where: str) -> UnsafeImage:
    return UnsafeImage("The VHDX is a differencing disk: it names a parent", where, "Merge it into its parent first")
