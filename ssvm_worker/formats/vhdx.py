"""Check VHDX: [MS-VHDX], https://learn.microsoft.com/openspecs/windows_protocols/ms-vhdx/ (little-endian).

    0          "vhdxfile"
    192 KiB    region table: "regi" · 8 number of entries · 16 entries of 32: GUID, offset, length (u32), required (u32)
    ≥ 1 MiB    metadata region: "metadata" · 10 number · 32 entries of 32: GUID, offset from here (u32), length (u32)
               items: file parameters (block size u32, flags u32, bit 1 has parent) · virtual disk size (u64)
                      · logical sector size (u32)
    64, 128 KiB  headers: "head" · 8 sequence number (u64) · 48 GUID of the log · 68 length (u32), 72 offset of the log
    log        entries at multiples of 4 KiB: "loge" · 8 length (u32) · 16 sequence number (u64) · 32 GUID of the log
               · 48 smallest size of the file (u64)
    BAT        entries of 8: bits 0 to 2 state, 20 to 63 offset in MiB. A bitmap's entry follows each 2^23 sectors.

Safety: no parent.
Truncation: each region, the log, and each block in state 6 is completely inside the file. A fixed image may have a
short block at the end of the disk.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Generator
from typing import NamedTuple

from ssvm_worker.errors import UnknownFormat, UnsafeImage
from ssvm_worker.units import KiB, MiB, TiB

from .detect import ImageBytes, ImageFacts, ImageRange, Rules, corrupt, cut_short, entries, in_pieces

MAGIC = b"vhdxfile"
_REGIONS_AT, _TABLE = 192 * KiB, 64 * KiB
_MAX_ENTRIES = 2047
#: [MS-VHDX] 2.6.2.2: the largest virtual disk.
_MAX_SIZE = 64 * TiB
_BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_VIRTUAL_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_SECTOR_SIZE = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_HAS_PARENT = 2
#: States from here on have a valid offset: 6 fully present, 7 partially present. Others may have a stale one. 2.5.1.1.
_PRESENT = 6
_OFFSET_MASK = 0xFFFFFFFFFFF00000


class _Entry(NamedTuple):
    offset: int
    length: int


def matches(head: bytes) -> bool:
    """Return whether the image begins as a VHDX."""
    return head.startswith(MAGIC)


def rules(head: bytes, where: str) -> Rules:
    """Check a VHDX. See ``detect``."""
    if len(head) < _REGIONS_AT + _TABLE:
        raise cut_short("the headers of a VHDX take 256 KiB", len(head), where)
    regions = _region_table(head[_REGIONS_AT : _REGIONS_AT + _TABLE], where)
    log, guid = _log(head)
    end = max(region.offset + region.length for region in (*regions.values(), log))
    metadata = (0, 0, 0, 0)
    present: list[tuple[int, int]] = []
    for region in sorted({regions[_BAT], regions[_METADATA], log}):
        if region == regions[_METADATA]:
            metadata = yield from _metadata(region.offset, where)
        elif region == regions[_BAT]:
            present = yield from _furthest_blocks(region)
        elif any(guid):
            end = max(end, (yield from _logged_size(region, guid)))
    block, flags, virtual_size, sector = metadata
    details: dict[str, object] = {"subformat": "fixed" if flags & 1 else "dynamic", "block_size": block}
    facts = ImageFacts("vhdx", virtual_size, details)
    size = (yield facts).size
    if end > size:
        raise cut_short(f"a region ends at offset {end}, or its log says so", size, where)
    last = (virtual_size - 1) // block
    last_number = last + last // ((sector << 23) // block)  # each group of blocks has one more entry for its bitmap
    for number, offset in present:
        is_short = flags & 1 and number == last_number
        if offset + (virtual_size - last * block if is_short else block) > size:
            raise cut_short(f"a block of {block} bytes is at offset {offset}", size, where)
    return facts


def _log(head: bytes) -> tuple[_Entry, bytes]:
    """Return region and GUID of the log, by the header with the higher number. GUID 0: there is nothing to replay."""
    headers = [head[at : at + 80] for at in (64 * KiB, 128 * KiB) if head.startswith(b"head", at)]
    if not headers:
        return _Entry(0, 0), bytes(16)
    current = max(headers, key=lambda each: int.from_bytes(each[8:16], "little"))
    length, offset = struct.unpack_from("<IQ", current, 68)
    return _Entry(offset, length), current[48:64]


def _logged_size(log: _Entry, guid: bytes) -> Generator[ImageRange | ImageFacts, ImageBytes, int]:
    """Return the smallest size of the file by the last entry of the log: [MS-VHDX] 2.3.1.1, FlushedFileOffset."""
    newest = size = 0
    for piece in in_pieces(log.offset, log.length, f"its log ends at offset {log.offset + log.length}", 4 * KiB):
        data = (yield piece).data
        for at in range(0, len(data) - 63, 4 * KiB):
            number, file_size = struct.unpack_from("<Q", data, at + 16)[0], struct.unpack_from("<Q", data, at + 48)[0]
            if data.startswith(b"loge", at) and data[at + 32 : at + 48] == guid and number >= newest:
                newest, size = number, file_size
    return size


def _furthest_blocks(bat: _Entry) -> Generator[ImageRange | ImageFacts, ImageBytes, list[tuple[int, int]]]:
    """Return (number, offset) of the two last present blocks. All blocks except the disk's last have the same size."""
    found: list[tuple[int, int]] = []
    number = 0
    for piece in in_pieces(bat.offset, bat.length // 8 * 8, f"its block table ends at {bat.offset + bat.length}"):
        table = (yield piece).data
        present = ((index, entry) for index, entry in entries(table, "<Q") if entry & 7 >= _PRESENT)
        found += [(number + index, entry & _OFFSET_MASK) for index, entry in present]
        found = sorted(found, key=lambda each: each[1])[-2:]
        number += len(table) // 8
    return found


def _metadata(at: int, where: str) -> Generator[ImageRange | ImageFacts, ImageBytes, tuple[int, int, int, int]]:
    """Return block size, flags, virtual size and sector size from the metadata region."""
    items = _metadata_table((yield ImageRange(at, _TABLE)).data, where)
    values: dict[uuid.UUID, bytes] = {}
    wanted = [each for each in (_FILE_PARAMETERS, _VIRTUAL_SIZE, _SECTOR_SIZE) if each in items]
    for guid in sorted(wanted, key=lambda each: items[each].offset):
        values[guid] = (yield ImageRange(at + items[guid].offset, 4 if guid == _SECTOR_SIZE else 8)).data
    block, flags = struct.unpack("<II", values[_FILE_PARAMETERS])
    virtual_size: int = struct.unpack("<Q", values[_VIRTUAL_SIZE])[0]
    if flags & _HAS_PARENT:
        raise _differencing(where)
    if not 0 < virtual_size <= _MAX_SIZE:
        raise corrupt(f"The VHDX says that it has {virtual_size} bytes", where)
    sector = int.from_bytes(values.get(_SECTOR_SIZE, b""), "little") or 512
    if not MiB <= block <= 256 * MiB or block & (block - 1) or sector not in (512, 4096):
        raise corrupt(f"The VHDX has blocks of {block} bytes and sectors of {sector}", where)
    return block, flags, virtual_size, sector


def _region_table(table: bytes, where: str) -> dict[uuid.UUID, _Entry]:
    count = struct.unpack_from("<I", table, 8)[0]
    if not table.startswith(b"regi") or count > _MAX_ENTRIES:
        raise corrupt("The VHDX has no valid region table", where)
    regions: dict[uuid.UUID, _Entry] = {}
    for at in range(16, 16 + 32 * count, 32):
        guid = uuid.UUID(bytes_le=table[at : at + 16])
        offset, length, required = struct.unpack_from("<QII", table, at + 16)
        if required and guid not in (_BAT, _METADATA):
            raise UnknownFormat(
                f"The VHDX needs an unknown region, {guid}", where, "Convert it with the tool that made it"
            )
        if offset < MiB or offset % MiB or offset >> 60 or guid in regions:
            raise corrupt(f"The VHDX has a region at offset {offset}, or two regions of a kind", where)
        regions[guid] = _Entry(offset, length)
    if not {_BAT, _METADATA} <= regions.keys():
        raise corrupt("The VHDX lacks a block table or its metadata", where)
    return regions


def _metadata_table(table: bytes, where: str) -> dict[uuid.UUID, _Entry]:
    count = struct.unpack_from("<H", table, 10)[0]
    if not table.startswith(b"metadata") or count > _MAX_ENTRIES:
        raise corrupt("The VHDX has no valid metadata table", where)
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
