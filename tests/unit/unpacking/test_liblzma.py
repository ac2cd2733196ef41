"""The decoder of the extra ``xz`` and the standard library's decoder give equal results."""

from __future__ import annotations

import functools
import lzma
import os
from collections.abc import Callable

import pytest

from ssvm_worker.unpacking.compression import MEMORY, XZ_OPTIONS, Decoder, LZMADecompressor
from tests.archives import xz_with_dictionary
from tests.neighbours import missing

DATA = b"words and words again " * 20_000 + os.urandom(50_000)
WHOLE = lzma.compress(DATA, preset=0)
WIDE = xz_with_dictionary(512 << 20)


def outcome(decoder: Callable[..., Decoder], data: bytes) -> object:
    """Return the output, the rest, and whether the stream has ended or wants input, or its error."""
    reading, inside = decoder(lzma.FORMAT_XZ, memlimit=MEMORY), b""
    try:
        for at in range(0, len(data), 4096):
            inside += reading.decompress(data[at : at + 4096], 1000)
            while not reading.needs_input and not reading.eof:
                inside += reading.decompress(b"", 1000)
            if reading.eof:
                return inside, reading.unused_data, data[at + 4096 :]
    except lzma.LZMAError as error:
        return inside, "memory" if "memory" in str(error).lower() else "damaged"
    return inside, reading.eof, reading.needs_input


@pytest.mark.parametrize(
    ("data", "end"),
    [
        pytest.param(WHOLE, (b"", b""), id="whole"),
        pytest.param(WHOLE + b"behind", (b"behind", b""), id="something behind it"),
        pytest.param(WHOLE[:-20], (False, True), id="cut in its index"),
        pytest.param(WHOLE[: len(WHOLE) // 2], (False, True), id="cut in its middle"),
        pytest.param(WHOLE[:30_000] + b"\0\0\0\0" + WHOLE[30_004:], ("damaged",), id="damaged"),
        pytest.param(WHOLE[:-1] + b"?", ("damaged",), id="another end"),
        pytest.param(WIDE, ("memory",), id="a wide dictionary"),
        pytest.param(lzma.compress(b""), (b"", b""), id="empty"),
    ],
)
def test_same_of_the_same(data: bytes, end: tuple[object, ...]) -> None:
    """Both decoders give the same bytes, ends and errors for complete, cut, damaged and memory-hungry streams."""
    if LZMADecompressor is lzma.LZMADecompressor:
        missing("lzma-mt", "uv sync --extra xz")
    found = outcome(functools.partial(LZMADecompressor, **XZ_OPTIONS), data)
    assert found == outcome(lzma.LZMADecompressor, data)
    assert isinstance(found, tuple)
    assert found[1:] == end
