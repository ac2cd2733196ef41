"""Creates bad images from good images: the fuzzer's input is a short script of edits.

A fuzzer that mutates an image directly spends its time in the payload. A script has the number of an image, then
edits. An edit has the number of a block that is not empty, an offset in it, and the new bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

_BLOCK = 64
#: Bytes of an edit before its new bytes: block (2), offset in the block (1), number of new bytes (1).
_HEAD = 4
#: An edit of this length truncates the image.
_TRUNCATE = 255
_MAX_EDIT = 16


def edited(script: bytes, images: Sequence[bytes]) -> bytes:
    """Return the image that the script describes. Any bytes are a valid script."""
    original = images[script[0] % len(images)] if script else images[0]
    image, position = bytearray(original), 1
    blocks = _used_blocks(original)
    while position + _HEAD <= len(script):
        block = int.from_bytes(script[position : position + 2], "little")
        offset, length = script[position + 2], script[position + 3]
        position += _HEAD
        start = blocks[block % len(blocks)] + offset % _BLOCK
        if length == _TRUNCATE:
            del image[start:]
            continue
        new = script[position : position + length % _MAX_EDIT + 1]
        position += len(new)
        image[start : start + len(new)] = new
    return bytes(image)


@lru_cache(maxsize=256)
def _used_blocks(image: bytes) -> list[int]:
    """Return the offsets of blocks that are not zeros, and of the blocks after them."""
    full = {start for start in range(0, len(image), _BLOCK) if image[start : start + _BLOCK].strip(b"\0")}
    return sorted(full | {start + _BLOCK for start in full}) or [0]
