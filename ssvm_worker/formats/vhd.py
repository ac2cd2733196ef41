"""Check VHD: Microsoft's "Virtual Hard Disk Image Format Specification", October 2006 (big-endian).

The footer is the last 512 bytes of every VHD. Dynamic and differencing VHDs have a copy at offset 0:

     0  cookie "conectix"     40  original size, bytes      60  type: 2 fixed, 3 dynamic, 4 differencing
    16  dynamic header, at    48  current size, bytes       64  checksum: ~ sum of all bytes but its own

Dynamic header, 1024 bytes:  0 "cxsparse" · 16 BAT, offset · 28 BAT, entries · 32 block size · 64 parent's name (UTF-16)
BAT entry: the sector of a block's bitmap, or 0xFFFFFFFF.

A block begins with its bitmap: one bit for each sector of the block, in whole sectors. The data of the block follows.

Safety: no parent.
Truncation: the footer is at the end, and each block in the BAT is completely before it. The block at the end of the
disk may be as short as the end of the disk.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ssvm_worker.errors import UnsafeImage
from ssvm_worker.units import GiB

from .detect import ImageFacts, ImageRange, Rules, corrupt, cut_short, entries, in_pieces

COOKIE = b"conectix"
FOOTER = 512
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
_TYPES = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}
#: The limit of the specification.
_MAX_SIZE = 2040 * GiB
_UNUSED = 0xFFFFFFFF


class _Footer(NamedTuple):
    dynamic_at: int
    size: int
    kind: int


def matches(head: bytes) -> bool:
    """Return whether the image begins with the copy of a footer. A fixed VHD has no copy."""
    return head.startswith(COOKIE)


def is_fixed(tail: bytes, size: int) -> bool:
    """Return whether the bytes end with a valid footer of a fixed VHD of exactly this size."""
    last = tail[-FOOTER:]
    if len(last) < FOOTER or not last.startswith(COOKIE) or not _has_valid_checksum(last):
        return False
    footer = _unpack(last)
    return footer.kind == FIXED and footer.size + FOOTER == size


def fixed(tail: bytes, size: int, where: str) -> ImageFacts:
    """Return the facts of an image that ends with a VHD footer but does not begin with one."""
    if is_fixed(tail, size):
        return ImageFacts("vhd", size - FOOTER, {"subformat": "fixed"})
    footer = _footer(tail[-FOOTER:], where)
    if footer.kind == FIXED:
        raise cut_short(f"its VHD footer says {footer.size + FOOTER} bytes", size, where)
    raise corrupt("The image ends as a dynamic VHD but does not begin as one", where)


def rules(head: bytes, where: str) -> Rules:
    """Check a dynamic VHD. See ``detect``."""
    if len(head) < FOOTER:
        raise cut_short("a VHD footer has 512 bytes", len(head), where)
    footer = _footer(head[:FOOTER], where)
    if footer.kind not in (DYNAMIC, DIFFERENCING):
        raise corrupt(f"The VHD begins with the footer of type {_TYPES.get(footer.kind, footer.kind)}", where)
    dynamic = (yield ImageRange(footer.dynamic_at, 1024)).data
    table_at, blocks, block = _parse_dynamic(dynamic, footer, where)
    end = table_at + blocks * 4
    last_block = (footer.size - 1) // block
    bitmap = -(-block // 512 // 8 // 512) * 512
    for piece in in_pieces(table_at, blocks * 4, f"its block table ends at offset {end}", 4):
        first = (piece.offset - table_at) // 4
        for number, sector in entries((yield piece).data, ">I", b"\xff"):
            if sector != _UNUSED:
                data = footer.size - last_block * block if first + number == last_block else block
                end = max(end, sector * 512 + bitmap + data)
    facts = ImageFacts("vhd", footer.size, {"subformat": "dynamic", "block_size": block})
    tail, size = yield facts
    last = tail[-FOOTER:]
    if not last.startswith(COOKIE) or not _has_valid_checksum(last):
        raise cut_short("no VHD footer at its end", size, where)
    if _unpack(last) != footer:
        raise corrupt("The two footers of the VHD differ", where)
    if end > size - FOOTER:
        raise cut_short(f"its block table or last block ends at offset {end}, before its footer", size, where)
    return facts


def _parse_dynamic(dynamic: bytes, footer: _Footer, where: str) -> tuple[int, int, int]:
    """Return BAT offset, BAT entries and block size."""
    if not dynamic.startswith(b"cxsparse"):
        raise corrupt("The VHD has no dynamic header where its footer says", where)
    table_at, _version, blocks, block = struct.unpack_from(">QIII", dynamic, 16)
    if footer.kind == DIFFERENCING:
        parent = dynamic[64:576].decode("utf-16-be", "replace").split("\0")[0]
        raise UnsafeImage(
            f"The VHD is a differencing disk; its parent is {parent!a}", where, "Merge it into its parent first"
        )
    if block < 512 or block & (block - 1) or blocks < -(-footer.size // block) or table_at >> 56:
        raise corrupt(f"The VHD has {blocks} blocks of {block} bytes for {footer.size} bytes", where)
    return table_at, blocks, block


def _footer(data: bytes, where: str) -> _Footer:
    if not _has_valid_checksum(data):
        raise corrupt("The VHD footer has a wrong checksum", where)
    footer = _unpack(data)
    if not 0 < footer.size <= _MAX_SIZE:
        raise corrupt(f"The VHD says that it has {footer.size} bytes", where)
    return footer


def _unpack(data: bytes) -> _Footer:
    dynamic_at = struct.unpack_from(">Q", data, 16)[0]
    size, _geometry, kind = struct.unpack_from(">QII", data, 48)
    return _Footer(dynamic_at, size, kind)


def _has_valid_checksum(data: bytes) -> bool:
    """Return whether the checksum of a footer is correct."""
    checksum: int = struct.unpack_from(">I", data, 64)[0]
    return checksum == ~(sum(data) - sum(data[64:68])) & 0xFFFFFFFF
