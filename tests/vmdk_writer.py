"""Write streamOptimized VMDK files in the form that an ESX host sends, for disks of simulated VMs.

Every function accepts header fields by name, so that a test can create a bad image by changing one field.
Layout: VMware's "Virtual Disk Format 5.0" technical note.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SECTOR = 512
GRAIN = 64 * 1024
#: Value of gd_offset in the header of a stream: the footer has the offset of the grain directory.
GD_AT_END = 0xFFFFFFFFFFFFFFFF
MARKER_EOS, MARKER_GT, MARKER_GD, MARKER_FOOTER = range(4)


def padded(data: bytes, to: int) -> bytes:
    """Return the bytes, padded with zeros to the next multiple of *to*."""
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
    """Return the first sector of a sparse VMDK. Sizes and offsets are in sectors."""
    values = _VMDK_FIELDS | fields
    return padded(struct.pack("<4sIIQQQQIQQQB4sH", *values.values()), SECTOR)


def vmdk_descriptor(sectors: int, **fields: str) -> bytes:
    """Return the text descriptor.

    *extent* replaces the extent line, *extra* adds lines, and an empty value omits a key.
    """
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
    """Return a metadata marker of a stream: the number and the kind of the sectors that follow."""
    return padded(struct.pack("<QII", sectors, 0, kind), SECTOR)


def vmdk_grain(lba: int, grain: bytes) -> bytes:
    """Return one compressed grain with its marker. *lba* is in sectors."""
    data = zlib.compress(grain, 1)
    return padded(struct.pack("<QI", lba, len(data)) + data, SECTOR)


def stream_optimized(raw: bytes, capacity: int | None = None, descriptor: bytes | None = None, **header: int) -> bytes:
    """Return a streamOptimized VMDK of *raw*: written in one direction, without grains of zeros.

    *capacity* (bytes) may be larger than *raw*. Both are rounded up to sectors. ``qemu-img`` can check and read the
    result.
    """
    return b"".join(stream_optimized_pieces(raw, capacity, descriptor, **header))


def stream_optimized_pieces(
    raw: bytes, capacity: int | None = None, descriptor: bytes | None = None, **header: int
) -> Iterator[bytes]:
    """Yield the pieces of ``stream_optimized``: head, each grain, grain tables, grain directory, footer, EOS.

    Each piece is a multiple of a sector.
    """
    sectors = -(-max(capacity or 0, len(raw)) // SECTOR)
    fields = {"capacity": sectors} | header
    text = vmdk_descriptor(sectors) if descriptor is None else descriptor
    head = vmdk_header(**fields) + padded(text, 20 * SECTOR)
    yield padded(head, GRAIN)
    sector = GRAIN // SECTOR
    tables: dict[int, list[int]] = {}
    for start in range(0, len(raw), GRAIN):
        grain = raw[start : start + GRAIN].ljust(GRAIN, b"\0")
        if grain.count(0) == GRAIN:
            continue
        index = start // GRAIN
        tables.setdefault(index // 512, [0] * 512)[index % 512] = sector
        piece = vmdk_grain(start // SECTOR, grain)
        yield piece
        sector += len(piece) // SECTOR
    directory = [0] * -(-sectors // (512 * 128))
    for number, table in tables.items():
        yield vmdk_marker(4, MARKER_GT) + struct.pack("<512I", *table)
        directory[number] = sector + 1
        sector += 5
    packed = padded(struct.pack(f"<{len(directory)}I", *directory), SECTOR)
    yield vmdk_marker(len(packed) // SECTOR, MARKER_GD) + packed
    yield vmdk_marker(1, MARKER_FOOTER) + vmdk_header(**fields | {"gd_offset": sector + 1})
    yield vmdk_marker(0, MARKER_EOS)
