"""Check a raw disk: sectors without a header. An image with a known magic is not raw, even if a request says so.

    0     446  partition entries, 16 bytes each: 4 type (0xEE: a GPT follows) · 510  55 AA      MBR
    512   (or 4096) "EFI PART" · 32 the sector of its other copy, the last of the disk           UEFI 2.10, 5.3.2

A partition table cannot name a file, so an odd one is no reason to refuse the disk.
Truncation: a GPT's second copy must be inside the file. A partition of an MBR that ends behind the file is only a
warning: some writers give a partition more than the disk has.
A fixed VHD is a raw disk with a footer behind it: see vhd.
"""

from __future__ import annotations

import struct

from ssvm_worker.errors import UnknownFormat

from . import vhd
from .detect import ASK_PUBLISHER, ImageFacts, Rules, cut_short

_SECTOR = 512
_SIGNATURE = b"\x55\xaa"
_PROTECTIVE = 0xEE


def rules(head: bytes, where: str) -> Rules:
    """Check an image without a magic: a raw disk, or a fixed VHD. See ``detect``."""
    tail, size = yield ImageFacts("raw", 0)
    if tail[-vhd.FOOTER :].startswith(vhd.COOKIE):
        return vhd.fixed(tail, size, where)
    if size < _SECTOR or size % _SECTOR:
        raise UnknownFormat(
            f"{size} bytes are no disk image. A raw disk has whole sectors of 512 bytes", where, ASK_PUBLISHER
        )
    table, last = partition_table(head)
    if last > size:
        raise cut_short(f"its GPT describes a disk of {last} bytes", size, where)
    details: dict[str, object] = {"partition_table": table}
    end = max((start + length for start, length in mbr_partitions(head)), default=0) if table == "mbr" else 0
    if end > size:
        details["warnings"] = [f"A partition ends at offset {end}, the disk at {size}: it may be cut short"]
    return ImageFacts("raw", size, details)


def mbr_partitions(head: bytes) -> list[tuple[int, int]]:
    """Return first byte and length of each partition of an MBR."""
    if head[510:512] != _SIGNATURE:
        return []
    entries = [struct.unpack_from("<4xB3xII", head, at) for at in range(446, 510, 16)]
    return [(start * _SECTOR, count * _SECTOR) for kind, start, count in entries if kind]


def partition_table(head: bytes) -> tuple[str, int]:
    """Return mbr, gpt or none, and the bytes of a disk with this GPT, else 0."""
    if head[510:512] != _SIGNATURE:
        return "none", 0
    entries = [head[at : at + 16] for at in range(446, 510, 16)]
    if any(entry[4] == _PROTECTIVE for entry in entries):
        for sector in (512, 4096):
            if head[sector : sector + 8] == b"EFI PART" and len(head) >= sector + 40:
                last = struct.unpack_from("<Q", head, sector + 32)[0]
                return "gpt", (last + 1) * sector
    used = [entry for entry in entries if entry[4]]
    return ("mbr" if used and all(entry[0] in (0, 0x80) for entry in entries) else "none"), 0
