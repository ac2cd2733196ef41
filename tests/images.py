"""A little language that builds tiny disk images, good and bad, from parameters; no image is ever checked in.

Every builder returns the bytes of a whole image and takes each header field by name, so that a bad image is a good
one with one field changed: ``qcow2(backing_offset=512)``. Images that other tools can make are made by those tools.
"""

from __future__ import annotations

import struct
import uuid
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


# --- VMDK -----------------------------------------------------------------------------------------------------------

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


# --- QCOW2 ----------------------------------------------------------------------------------------------------------

_QCOW2_CLUSTER = 4096
_QCOW2_FIELDS = {
    "magic": b"QFI\xfb",
    "version": 3,
    "backing_offset": 0,
    "backing_size": 0,
    "cluster_bits": 12,
    "size": 1 << 20,
    "crypt_method": 0,
    "l1_size": 1,
    "l1_offset": 3 * _QCOW2_CLUSTER,
    "refcount_offset": _QCOW2_CLUSTER,
    "refcount_clusters": 1,
    "snapshots": 0,
    "snapshots_offset": 0,
    "incompatible": 0,
    "compatible": 0,
    "autoclear": 0,
    "refcount_order": 4,
    "header_length": 112,
    "compression": 0,
}


def qcow2(text: bytes = b"", l1_entry: int = 0, **fields: int | bytes) -> bytes:
    """A qcow2 of five clusters of 4 KiB: header, refcount table and block, L1 table, one spare cluster.

    *text* lies at offset 1024, for names of other files; *l1_entry* is the only entry of the L1 table.
    """
    values = _QCOW2_FIELDS | fields
    header = struct.pack(">4sIQIIQIIQQIIQQQQIIB7x", *values.values())
    if values["version"] == 2:
        header = header[:72]
    first = padded(header.ljust(1024, b"\0") + text, _QCOW2_CLUSTER)
    table = struct.pack(">Q", 2 * _QCOW2_CLUSTER)
    counts = struct.pack(">5H", 1, 1, 1, 1, 1 if l1_entry else 0)
    l1 = struct.pack(">Q", l1_entry)
    return b"".join(padded(each, _QCOW2_CLUSTER) for each in (first, table, counts, l1, b"\0"))


def qcow2_backed_by(name: str, **fields: int | bytes) -> bytes:
    """A qcow2 that names a backing file."""
    return qcow2(name.encode(), backing_offset=1024, backing_size=len(name), **fields)


def qcow2_data_file(name: str, **fields: int | bytes) -> bytes:
    """A qcow2 that keeps its data in another file, named by a header extension."""
    image = bytearray(qcow2(**{"incompatible": 4} | fields))
    extension = struct.pack(">II", 0x44415441, len(name)) + padded(name.encode(), 8) + bytes(8)
    image[112 : 112 + len(extension)] = extension
    return bytes(image)


# --- VHD and VHDX ---------------------------------------------------------------------------------------------------


def vhd_footer(size: int, kind: int, dynamic_at: int = 0xFFFFFFFFFFFFFFFF, checksum: int | None = None) -> bytes:
    """The last sector of every VHD; kind 2 is fixed, 3 dynamic, 4 differencing."""
    start = struct.pack(
        ">8sIIQI4sI4sQQII", b"conectix", 2, 0x10000, dynamic_at, 0, b"qem2", 1, b"Wi2k", size, size, 0, kind
    )
    data = padded(start, SECTOR)
    if checksum is None:
        checksum = ~sum(data) & 0xFFFFFFFF
    return data[:64] + struct.pack(">I", checksum) + data[68:]


def vhd_fixed(raw: bytes, **fields: int) -> bytes:
    """A raw disk with a footer."""
    return raw + vhd_footer(**{"size": len(raw), "kind": 2} | fields)


def vhd_dynamic(
    size: int = 4 << 20, parent: str = "", block: int = 0, end: bytes | None = None, **footer: int
) -> bytes:
    """An empty dynamic VHD with blocks of 2 MiB, or a differencing one; *block* is the sector of the first block."""
    entries = -(-size // (2 << 20))
    head = vhd_footer(**{"size": size, "kind": 4 if parent else 3, "dynamic_at": SECTOR} | footer)
    dynamic = struct.pack(">8sQQIII", b"cxsparse", 0xFFFFFFFFFFFFFFFF, 1536, 0x10000, entries, 2 << 20).ljust(64, b"\0")
    table = struct.pack(f">{entries}I", *[block or 0xFFFFFFFF, *[0xFFFFFFFF] * (entries - 1)])
    body = (dynamic + parent.encode("utf-16-be")).ljust(1024, b"\0") + table.ljust(SECTOR, b"\xff")
    return head + body + (head if end is None else end)


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


def vhdx(size: int = 4 << 20, flags: int = 0, parent: bool = False, bat_at: int = 2 << 20, required: int = 1) -> bytes:
    """The parts of a VHDX that say what it is: 3 MiB; flag 2 and *parent* each make it a differencing disk."""
    regions = [("2dc27766-f623-4200-9d64-115e9bfd4a08", bat_at), ("8b7ca206-4790-4b9a-b8fe-575f050f886e", 1 << 20)]
    if required > 1:
        regions.append(("00000000-0000-0000-0000-000000000001", 1 << 20))
    items = [("caa16737-fa36-4d43-b3b6-33f0aa44e76b", 65536), ("2fa54224-cd1b-4876-b211-5dbed83bf4b8", 65544)]
    if parent:
        items.append(("a8d35f2d-b30b-454d-abf7-d3d84834ab0c", 65552))
    image = bytearray(3 << 20)
    image[:8] = b"vhdxfile"
    at, table = 192 << 10, struct.pack("<4sIII", b"regi", 0, len(regions), 0)
    table += b"".join(_guid(name) + struct.pack("<QII", offset, 1 << 20, 1) for name, offset in regions)
    image[at : at + len(table)] = table
    table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
    table += b"".join(_guid(name) + struct.pack("<IIII", offset, 8, 4, 0) for name, offset in items)
    image[1 << 20 : (1 << 20) + len(table)] = table
    at = (1 << 20) + 65536
    image[at : at + 16] = struct.pack("<IIQ", 1 << 20, flags, size)
    return bytes(image)


# --- ISO, raw, and two at once --------------------------------------------------------------------------------------


def iso(blocks: int = 20, system_area: bytes = b"", says: int | None = None, block: int = 2048) -> bytes:
    """The smallest ISO 9660: system area, primary volume descriptor, terminator, and empty blocks."""
    says = blocks if says is None else says
    volume = bytearray(2048)
    volume[:7] = b"\x01CD001\x01"
    volume[80:88] = struct.pack("<I", says) + struct.pack(">I", says)
    volume[128:132] = struct.pack("<H", block) + struct.pack(">H", block)
    return (system_area.ljust(32 << 10, b"\0") + volume + b"\xffCD001\x01").ljust(blocks * 2048, b"\0")


def mbr(size: int = 1 << 20, kind: int = 0x83) -> bytes:
    """A raw disk with one partition, or the protective entry of a GPT (kind 0xEE)."""
    start = b"\x00\x00\x02\x00" if kind == 0xEE else b"\x80\x01\x01\x00"
    entry = start + bytes([kind]) + b"\xfe\xff\xff" + struct.pack("<II", 1, size // SECTOR - 1)
    return (b"\x33\xc0".ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa").ljust(size, b"\0")


def gpt(size: int = 1 << 20, sector: int = SECTOR) -> bytes:
    """A raw disk with a GPT whose second copy is its last sector."""
    header = b"EFI PART" + struct.pack("<IIIIQQ", 0x10000, 92, 0, 0, 1, size // sector - 1)
    return overlay(mbr(size, 0xEE), {sector: header, size - sector: header})


def overlay(image: bytes, patches: dict[int, bytes]) -> bytes:
    """The image with other bytes at some offsets, made longer where need be."""
    result = bytearray(image)
    for at, patch in patches.items():
        result.extend(bytes(max(0, at + len(patch) - len(result))))
        result[at : at + len(patch)] = patch
    return bytes(result)
