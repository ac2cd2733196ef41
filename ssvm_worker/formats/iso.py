"""ISO 9660 (ECMA-119) and UDF (ECMA-167) optical images.

    32 KiB   volume descriptor: 0 type (1 = primary) · 1 "CD001" · 80 volume size in blocks · 128 block size
             (both first little-endian, then big-endian); UDF alone has "BEA01" or "NSR0x" in place of "CD001"

The first 32 KiB are free for boot code: an isohybrid image has an MBR there, and is still an ISO.
Truncation: the file holds the whole volume.
"""

from __future__ import annotations

import struct

from .probe import Facts, Rules, corrupt, cut_short

_AT = 32 * 1024
_IDENTIFIERS = (b"CD001", b"BEA01", b"NSR02", b"NSR03")


def matches(head: bytes) -> bool:
    """Whether a volume descriptor stands at 32 KiB."""
    return head[_AT + 1 : _AT + 6] in _IDENTIFIERS


def rules(head: bytes, where: str) -> Rules:
    """Judge an ISO; see probe."""
    descriptor = head[_AT : _AT + 2048]
    if len(descriptor) < 2048:
        raise cut_short("a volume descriptor has 2048 bytes", len(head), where)
    volume = 0
    if descriptor[1:6] == b"CD001" and descriptor[0] == 1:
        blocks, block = struct.unpack_from("<I", descriptor, 80)[0], struct.unpack_from("<H", descriptor, 128)[0]
        if block not in (512, 1024, 2048) or not blocks:
            raise corrupt(f"The ISO has {blocks} blocks of {block} bytes", where)
        volume = blocks * block
    details: dict[str, object] = {"volume_size": volume} if volume else {"subformat": "udf"}
    size = (yield Facts("iso", 0, details)).size
    if volume > size:
        raise cut_short(f"its volume has {volume} bytes", size, where)
    return Facts("iso", size, details)
