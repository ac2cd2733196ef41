"""Bad images made of good ones: a few bytes say which image, and what to write over it where.

A fuzzer that mutates an image itself spends its time in the payload. Here its input is a script: the number of an
image, then edits, each the number of a block that holds anything, the place in it, and the new bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

_BLOCK = 64
#: Bytes of an edit before its new bytes: block (2), place in it (1), how many bytes follow (1).
_HEAD = 4
#: An edit of this length cuts the image there.
_CUT = 255
_LONGEST = 16


def edited(script: bytes, images: Sequence[bytes]) -> bytes:
    """The image that the script describes; any bytes are a script."""
    original = images[script[0] % len(images)] if script else images[0]
    image, at = bytearray(original), 1
    blocks = _told(original)
    while at + _HEAD <= len(script):
        block, place, length = int.from_bytes(script[at : at + 2], "little"), script[at + 2], script[at + 3]
        at += _HEAD
        start = blocks[block % len(blocks)] + place % _BLOCK
        if length == _CUT:
            del image[start:]
            continue
        new = script[at : at + length % _LONGEST + 1]
        at += len(new)
        image[start : start + len(new)] = new
    return bytes(image)


@lru_cache(maxsize=256)
def _told(image: bytes) -> list[int]:
    """The blocks that are not zeros, and those beside them."""
    full = {at for at in range(0, len(image), _BLOCK) if image[at : at + _BLOCK].strip(b"\0")}
    return sorted(full | {at + _BLOCK for at in full}) or [0]
