"""Writes streamOptimized VMDK files as an ESX host sends them, for disks of simulated VMs.

Every builder takes each header field by name, so that a bad image is a good one with one field changed.
Layout: VMware's "Virtual Disk Format 5.0" technical note.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SECTOR = 512
GRAIN = 64 * 1024
#: In the header of a stream: the grain directory is named by the footer.
GD_AT_END = 0xFFFFFFFFFFFFFFFF
MARKER_EOS, MARKER_GT, MARKER_GD, MARKER_FOOTER = range(4)


def padded(data: bytes, to: int) -> bytes:
    """The bytes with zeros up to the next multiple of *to*."""
    return data + bytes(-len(data) % to)


_VMDK_FIELDS = {
    "magic": b"KDMV",
    "version": 3,
    "flags": 0x30001,  # newline test, compressed grains, markers
    "capacity": 0,  # sectors
    "grain_size": 128,  # sectors
    "descriptor_offset": 1,
    "descriptor_size": 20,
    "gtes_per_gt": 512,
    "rgd_offset": 0,
    "gd_offset": GD_AT_END,
    "overhead": 128,
    "unclean": 0,
    "newlines": b"\n \r\n",
    "compression": 1,  # deflate
}


def vmdk_header(**fields: int | bytes) -> bytes:
    """The first sector of a sparse VMDK; sizes and offsets in sectors."""
    values = _VMDK_FIELDS | fields
    return padded(struct.pack("<4sIIQQQQIQQQB4sH", *values.values()), SECTOR)


def vmdk_descriptor(sectors: int, **fields: str) -> bytes:
    """The text descriptor; *extent* replaces the extent line, *extra* adds lines, an empty value leaves a key out."""
    keys = {"version": "1", "CID": "5e1e5e1e", "parentCID": "ffffffff", "createType": '"streamOptimized"'}
    keys |= {key: value for key, value in fields.items() if key in keys}
    lines = [
        fields.get("start", "# Disk DescriptorFile"),
        *(f"{key}={value}" for key, value in keys.items() if value),
        fields.get("extent", f'RW {sectors} SPARSE "disk.vmdk"'),
        *fields.get("extra", "").splitlines(),
        'ddb.adapterType = "lsilogic"',
        f'ddb.geometry.cylinders = "{max(1, sectors // (255 * 63))}"',
        'ddb.geometry.heads = "255"',
        'ddb.geometry.sectors = "63"',
        'ddb.virtualHWVersion = "13"',
    ]
    return "\n".join(lines).encode() + b"\n"


def vmdk_marker(sectors: int, kind: int) -> bytes:
    """A metadata marker of a stream: how many sectors of which kind follow it."""
    return padded(struct.pack("<QII", sectors, 0, kind), SECTOR)


def vmdk_grain(lba: int, grain: bytes) -> bytes:
    """One compressed grain with its marker; *lba* in sectors."""
    data = zlib.compress(grain, 1)
    return padded(struct.pack("<QI", lba, len(data)) + data, SECTOR)


def stream_optimized(raw: bytes, capacity: int | None = None, descriptor: bytes | None = None, **header: int) -> bytes:
    """A streamOptimized VMDK of *raw* as an ESX host sends one: written forwards only, all-zero grains left out.

    *capacity* (bytes) may be larger than *raw*; both are rounded up to sectors. ``qemu-img`` checks and reads it.
    """
    return b"".join(stream_optimized_pieces(raw, capacity, descriptor, **header))


def stream_optimized_pieces(
    raw: bytes, capacity: int | None = None, descriptor: bytes | None = None, **header: int
) -> Iterator[bytes]:
    """The pieces of ``stream_optimized``: head, one for each grain, GT…, GD, footer, EOS; all end on a sector."""
    sectors = -(-max(capacity or 0, len(raw)) // SECTOR)
    fields = {"capacity": sectors} | header
    text = vmdk_descriptor(sectors) if descriptor is None else descriptor
    head = vmdk_header(**fields) + padded(text, 20 * SECTOR)
    yield padded(head, GRAIN)
    at = GRAIN // SECTOR
    tables: dict[int, list[int]] = {}
    for start in range(0, len(raw), GRAIN):
        grain = raw[start : start + GRAIN].ljust(GRAIN, b"\0")
        if grain.count(0) == GRAIN:
            continue
        index = start // GRAIN
        tables.setdefault(index // 512, [0] * 512)[index % 512] = at
        piece = vmdk_grain(start // SECTOR, grain)
        yield piece
        at += len(piece) // SECTOR
    directory = [0] * -(-sectors // (512 * 128))
    for number, table in tables.items():
        yield vmdk_marker(4, MARKER_GT) + struct.pack("<512I", *table)
        directory[number] = at + 1
        at += 5
    packed = padded(struct.pack(f"<{len(directory)}I", *directory), SECTOR)
    yield vmdk_marker(len(packed) // SECTOR, MARKER_GD) + packed
    yield vmdk_marker(1, MARKER_FOOTER) + vmdk_header(**fields | {"gd_offset": at + 1})
    yield vmdk_marker(0, MARKER_EOS)
