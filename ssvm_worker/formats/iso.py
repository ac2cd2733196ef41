"""Check ISO 9660 (ECMA-119) and UDF (ECMA-167) optical images.

    32 KiB   volume descriptor: 0 type (1 = primary) · 1 "CD001" · 80 volume size in blocks · 128 block size
             (both first little-endian, then big-endian); UDF alone has "BEA01" or "NSR0x" instead of "CD001"

    256 blocks   UDF's anchor: 0 tag (u16), 2 · 12 its own block · 16 length (u32), 20 block of the volume's descriptors
                 descriptor of a partition: 0 tag, 5 · 188 first block (u32) · 192 blocks (u32); of the volume: tag 6
                 · 264 length, 268 number of the partition maps · 440 the maps: type (u8), length (u8), …

The first 32 KiB are free for boot code. An isohybrid image has an MBR there, and is still an ISO.
Truncation: the file must hold the whole ISO 9660 volume, UDF's partitions and a GPT's second copy. It must also hold
each partition of an MBR that begins behind the volume.
"""

from __future__ import annotations

import struct
from collections.abc import Generator

from .detect import HEAD, ImageBytes, ImageFacts, ImageRange, Rules, corrupt, cut_short
from .raw import mbr_partitions, partition_table

_AT = 32 * 1024
_ANCHOR, _PARTITION, _VOLUME, _TERMINATOR = 2, 5, 6, 8
#: The block of UDF's anchor, and the possible sizes of a block. ECMA-167 3/8.4.2.1, UDF 2.60 2.2.3.
_ANCHOR_BLOCK, _BLOCKS = 256, (2048, 512, 1024, 4096)
#: The bytes of the volume's descriptors that are read. All writers use 16 blocks.
_MAX_DESCRIPTORS = 64 * 1024
_UDF = (b"NSR02", b"NSR03")
_IDENTIFIERS = (b"CD001", b"BEA01", *_UDF)
#: Identifiers behind the first descriptor: also the end of UDF's, and boot descriptors. ECMA-167 2/9.1.
_FOLLOWING = (*_IDENTIFIERS, b"TEA01", b"BOOT2")


def matches(head: bytes) -> bool:
    """Return whether there is a volume descriptor at 32 KiB."""
    return head[_AT + 1 : _AT + 6] in _IDENTIFIERS


def rules(head: bytes, where: str) -> Rules:
    """Check an ISO. See ``detect``."""
    descriptors = _descriptors(head)
    if not descriptors:
        raise cut_short("a volume descriptor has 2048 bytes", len(head), where)
    volume = 0
    for descriptor in [each for each in descriptors if each.startswith(b"\1CD001")][:1]:
        blocks, block = struct.unpack_from("<I", descriptor, 80)[0], struct.unpack_from("<H", descriptor, 128)[0]
        if block not in (512, 1024, 2048) or not blocks:
            raise corrupt(f"The ISO has {blocks} blocks of {block} bytes", where)
        volume = blocks * block
    details: dict[str, object] = {"volume_size": volume} if volume else {"subformat": "udf"}
    udf, block = yield from _udf_end(head)
    if not udf and (not volume or any(each[1:6] in _UDF for each in descriptors)):
        if not volume and len(head) < HEAD:
            raise cut_short("UDF has an anchor in its block 256", len(head), where)
        details["warnings"] = ["The end of the UDF volume is unknown. It was not checked that nothing is missing"]
    size = (yield ImageFacts("iso", 0, details)).size
    if not volume and size % block:
        raise cut_short(f"UDF has whole blocks of {block} bytes", size, where)
    appended = [start + length for start, length in mbr_partitions(head) if start >= volume > 0]
    for what, end in (
        (f"its volume has {volume} bytes", volume),
        (f"its UDF partition ends at offset {udf}", udf),
        (f"its GPT describes a disk of {partition_table(head)[1]} bytes", partition_table(head)[1]),
        (f"a partition behind its volume ends at offset {max(appended, default=0)}", max(appended, default=0)),
    ):
        if end > size:
            raise cut_short(what, size, where)
    return ImageFacts("iso", size, details)


def _descriptors(head: bytes) -> list[bytes]:
    """Return the complete descriptors from 32 KiB on. The primary one is usually the first, but need not be."""
    found: list[bytes] = []
    for at in range(_AT, len(head) - 2047, 2048):
        if head[at + 1 : at + 6] not in _FOLLOWING:
            break
        found.append(head[at : at + 2048])
    return found


def _udf_end(head: bytes) -> Generator[ImageRange | ImageFacts, ImageBytes, tuple[int, int]]:
    """Return the end of UDF's partitions and descriptors, and the block size, or (0, 1) if they are unknown.

    A disc that grows has a virtual partition. Its length is the length of the disc, not of the data.
    """
    for block in _BLOCKS:
        anchor = head[_ANCHOR_BLOCK * block :][:512]
        if len(anchor) < 28 or struct.unpack_from("<H10xI", anchor) != (_ANCHOR, _ANCHOR_BLOCK):
            continue
        length, first, second_length, second = struct.unpack_from("<4I", anchor, 16)
        if first * block < _ANCHOR_BLOCK * block and (first * block) + length > len(head):
            return 0, 1
        data = (yield ImageRange(first * block, min(length, _MAX_DESCRIPTORS), "its UDF descriptors are missing")).data
        end = 0
        for at in range(0, len(data) - block + 1, block):
            tag = struct.unpack_from("<H", data, at)[0]
            if tag == _PARTITION:
                start, blocks = struct.unpack_from("<II", data, at + 188)
                end = max(end, (start + blocks) * block)
            elif tag == _VOLUME and data[at + 440 : at + 441] == b"\2":
                return 0, 1
            elif tag == _TERMINATOR:
                break
        return max(end, second * block + second_length) if end else 0, block
    return 0, 1
