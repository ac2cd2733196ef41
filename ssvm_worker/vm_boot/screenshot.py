"""Compare pictures of a guest's screen, recognise a blank one, and write PNG."""

from __future__ import annotations

import re
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field

#: Netpbm's binary form, which QEMU writes: ppm(5).
_PPM = re.compile(rb"P6\s+(\d+)\s+(\d+)\s+255\s")
#: Two pictures are the same if at most this part of their bits differs, because a cursor blinks. A cursor on a text
#: screen has a 40,000th of the bits, a line of text a 700th.
_SAME = 1 / 4000
#: One of this many pixels is read to find the background. A prime does not follow a pattern of the screen.
_SAMPLE = 997
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """Screen with 24 bits per pixel."""

    width: int
    height: int
    pixels: bytes = field(repr=False)

    def is_like(self, other: Picture) -> bool:
        """Return whether both pictures are the same, apart from a cursor."""
        return (self.width, self.height) == (other.width, other.height) and self._close(other.pixels)

    @property
    def is_blank(self) -> bool:
        """Return whether the picture has one colour, apart from a cursor."""
        some = Counter(self.pixels[at : at + 3] for at in range(0, len(self.pixels), 3 * _SAMPLE))
        return self._close(some.most_common(1)[0][0] * (self.width * self.height))

    def _close(self, pixels: bytes) -> bool:
        differing = int.from_bytes(self.pixels, "big") ^ int.from_bytes(pixels, "big")
        return differing.bit_count() <= 8 * len(pixels) * _SAME

    def png(self) -> bytes:
        """Return the picture as PNG (ISO/IEC 15948): truecolour, no filter."""
        row = 3 * self.width
        lines = b"".join(b"\0" + self.pixels[at : at + row] for at in range(0, len(self.pixels), row))
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        return _PNG + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(lines, 6)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def read_ppm(data: bytes) -> Picture:
    """Parse a picture that QEMU dumped. Raises ValueError."""
    match = _PPM.match(data)
    if match is None:
        raise ValueError("not a PPM")

    width, height, pixels = int(match[1]), int(match[2]), data[match.end() :]
    if len(pixels) != 3 * width * height:
        raise ValueError(f"{len(pixels)} bytes in a PPM of {width}x{height}")
    return Picture(width, height, pixels)
