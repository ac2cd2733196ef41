"""Builders of tiny disk images, good and bad. The repository contains no images.

Every builder returns the bytes of a whole image and accepts header fields by name. So a test makes a bad image by one
changed field: ``qcow2(backing_offset=512)``. Other tools make the images that they can make.
"""

from __future__ import annotations

import struct
import uuid

from tests.vmdk_writer import (
    GD_AT_END,
    GRAIN,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    SECTOR,
    padded,
    stream_optimized,
    stream_optimized_pieces,
    vmdk_descriptor,
    vmdk_grain,
    vmdk_header,
    vmdk_marker,
)

__all__ = [
    "GD_AT_END",
    "GRAIN",
    "MARKER_EOS",
    "MARKER_FOOTER",
    "MARKER_GD",
    "MARKER_GT",
    "SECTOR",
    "padded",
    "stream_optimized",
    "stream_optimized_pieces",
    "vmdk_descriptor",
    "vmdk_grain",
    "vmdk_header",
    "vmdk_marker",
]

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
    """Return a qcow2 of five clusters of 4 KiB: header, refcount table and block, L1 table, one spare cluster.

    *text* is at offset 1024, for names of other files. *l1_entry* is the only entry of the L1 table.
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
    """Return a qcow2 that names a backing file."""
    return qcow2(name.encode(), backing_offset=1024, backing_size=len(name), **fields)


def qcow2_data_file(name: str, **fields: int | bytes) -> bytes:
    """Return a qcow2 with its data in another file, which a header extension names."""
    image = bytearray(qcow2(**{"incompatible": 4} | fields))
    extension = struct.pack(">II", 0x44415441, len(name)) + padded(name.encode(), 8) + bytes(8)
    image[112 : 112 + len(extension)] = extension
    return bytes(image)


# --- VHD and VHDX ---------------------------------------------------------------------------------------------------


def vhd_footer(size: int, kind: int, dynamic_at: int = 0xFFFFFFFFFFFFFFFF, checksum: int | None = None) -> bytes:
    """Return the last sector of a VHD. Kind 2 is fixed, 3 dynamic, 4 differencing."""
    start = struct.pack(
        ">8sIIQI4sI4sQQII", b"conectix", 2, 0x10000, dynamic_at, 0, b"qem2", 1, b"Wi2k", size, size, 0, kind
    )
    data = padded(start, SECTOR)
    if checksum is None:
        checksum = ~sum(data) & 0xFFFFFFFF
    return data[:64] + struct.pack(">I", checksum) + data[68:]


def vhd_fixed(raw: bytes, **fields: int) -> bytes:
    """Return a raw disk with a footer."""
    return raw + vhd_footer(**{"size": len(raw), "kind": 2} | fields)


def vhd_dynamic(
    size: int = 4 << 20, parent: str = "", block: int = 0, end: bytes | None = None, **footer: int
) -> bytes:
    """Return an empty dynamic or differencing VHD with blocks of 2 MiB. *block* is the sector of the first block."""
    entries = -(-size // (2 << 20))
    head = vhd_footer(**{"size": size, "kind": 4 if parent else 3, "dynamic_at": SECTOR} | footer)
    dynamic = struct.pack(">8sQQIII", b"cxsparse", 0xFFFFFFFFFFFFFFFF, 1536, 0x10000, entries, 2 << 20).ljust(64, b"\0")
    table = struct.pack(f">{entries}I", *[block or 0xFFFFFFFF, *[0xFFFFFFFF] * (entries - 1)])
    body = (dynamic + parent.encode("utf-16-be")).ljust(1024, b"\0") + table.ljust(SECTOR, b"\xff")
    return head + body + (head if end is None else end)


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


def vhdx(size: int = 4 << 20, flags: int = 0, parent: bool = False, bat_at: int = 2 << 20, required: int = 1) -> bytes:
    """Return the first 3 MiB of a VHDX, which describe it. Flag 2 and *parent* each make it a differencing disk."""
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
    """Return the smallest ISO 9660: system area, primary volume descriptor, terminator, and empty blocks."""
    says = blocks if says is None else says
    volume = bytearray(2048)
    volume[:7] = b"\x01CD001\x01"
    volume[80:88] = struct.pack("<I", says) + struct.pack(">I", says)
    volume[128:132] = struct.pack("<H", block) + struct.pack(">H", block)
    return (system_area.ljust(32 << 10, b"\0") + volume + b"\xffCD001\x01").ljust(blocks * 2048, b"\0")


def mbr(size: int = 1 << 20, kind: int = 0x83) -> bytes:
    """Return a raw disk with one partition, or with the protective entry of a GPT (kind 0xEE)."""
    start = b"\x00\x00\x02\x00" if kind == 0xEE else b"\x80\x01\x01\x00"
    entry = start + bytes([kind]) + b"\xfe\xff\xff" + struct.pack("<II", 1, size // SECTOR - 1)
    return (b"\x33\xc0".ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa").ljust(size, b"\0")


def gpt(size: int = 1 << 20, sector: int = SECTOR) -> bytes:
    """Return a raw disk with a GPT. Its second copy is the last sector."""
    header = b"EFI PART" + struct.pack("<IIIIQQ", 0x10000, 92, 0, 0, 1, size // sector - 1)
    return overlay(mbr(size, 0xEE), {sector: header, size - sector: header})


def overlay(image: bytes, patches: dict[int, bytes]) -> bytes:
    """Return the image with other bytes at some offsets. The image grows if necessary."""
    result = bytearray(image)
    for at, patch in patches.items():
        result.extend(bytes(max(0, at + len(patch) - len(result))))
        result[at : at + len(patch)] = patch
    return bytes(result)
