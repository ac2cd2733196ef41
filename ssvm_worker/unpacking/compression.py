"""Compressed streams: gzip (RFC 1952), bzip2, xz, zstandard (RFC 8878), each of any number of members.

What is true of all: an end that is missing, a wrong checksum or anything but zeros behind the end is an error; zeros
are padding (tapes, xz's own); one step unpacks a chunk at the most, whatever it unpacks to.
"""

from __future__ import annotations

import bz2
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from isal import igzip_lib

from ssvm_worker.errors import CorruptImage, TooLarge, WorkerError
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.units import MiB

from . import xz_blocks
from .exact_reader import ExactReader
from .liblzma import LZMADecompressor

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

IGZIP_ERROR: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stub says instance, not class
#: What a decoder may allocate. `xz -9` wants 65 MiB and `zstd --ultra -22` 128; xz may ask for 4 GiB, zstd for 2.
MEMORY = 128 * MiB
_WINDOW_LOG = 27
#: Compressed bytes for one step. A member's rest is copied when it ends, so that a file of tiny members costs the more
#: the larger this is; below it the calls begin to cost.
_STEP = 128 * 1024
AGAIN = "Download it again, or ask its publisher for a whole one"


class Decoder(Protocol):
    """One member of a stream; the shape of the standard library's decompressors."""

    @property
    def eof(self) -> bool:
        """Whether the end of the member was read, and its checksum found right."""

    @property
    def needs_input(self) -> bool:
        """Whether all that was given is used up."""

    @property
    def unused_data(self) -> bytes:
        """What follows the member in the data given."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


@dataclass(frozen=True)
class Compression:
    """One kind of compressed stream."""

    name: str
    #: How a member begins.
    magic: re.Pattern[bytes]
    decoder: Callable[[], Decoder]
    error: type[Exception]


def _gzip() -> Decoder:
    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


def _xz() -> Decoder:
    return LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)


def _zstandard() -> Decoder:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})


COMPRESSIONS = (
    Compression("gzip", re.compile(rb"\x1f\x8b\x08"), _gzip, IGZIP_ERROR),
    # A block, or the end of an empty stream: pi and its square root in decimals.
    Compression("bzip2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", re.DOTALL), bz2.BZ2Decompressor, OSError),
    Compression("xz", re.compile(rb"\xfd7zXZ\0"), _xz, lzma.LZMAError),
    # A frame, or one to be skipped, with which pzstd begins.
    Compression("zstandard", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstandard, zstd.ZstdError),
)


def decompress(chunks: Iterable[bytes], name: str, where: str, members: int = 0) -> Iterator[bytes]:
    """The bytes inside a compressed stream, in chunks; *members* have been read before.

    Bytes: holds one chunk of input, one of output, and MEMORY in the decoder. Raises CorruptImage, TooLarge (memory).
    """
    kind = next(each for each in COMPRESSIONS if each.name == name)
    decoder, begun = kind.decoder(), False
    for data in _steps(chunks):
        while data or not decoder.needs_input:
            if not begun and not (data := data.lstrip(b"\0") if members else data):
                break
            begun = True
            try:
                inside = decoder.decompress(data, CHUNK)
            except kind.error as error:
                raise _damaged(kind, error, members, where) from error
            if inside:
                yield inside
            data = b""
            if decoder.eof:
                data, decoder, begun, members = decoder.unused_data, kind.decoder(), False, members + 1
    if begun or not members:
        raise CorruptImage(f"The {name} stream is cut short", where, AGAIN)


def decompress_blocks(chunks: Iterable[bytes], where: str) -> Iterator[bytes]:
    """As ``decompress``, of an xz stream that ``xzblocks.has_blocks``; streams behind it are read in turn.

    Bytes: holds what ``xzblocks.stream`` holds.
    """
    pull = ExactReader(chunks)
    try:
        yield from xz_blocks.stream(pull, MEMORY)
    except EOFError as error:
        raise CorruptImage(f"The xz stream is cut short: {error}", where, AGAIN) from error
    except lzma.LZMAError as error:
        raise _damaged(next(each for each in COMPRESSIONS if each.name == "xz"), error, 0, where) from error
    yield from decompress(iter(pull.some, b""), "xz", where, members=1)


def _steps(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if len(chunk) <= _STEP:
            yield chunk
        else:
            yield from (chunk[at : at + _STEP] for at in range(0, len(chunk), _STEP))


def _damaged(kind: Compression, error: Exception, members: int, where: str) -> WorkerError:
    if "memory" in str(error).lower():  # both libraries have one class for all errors, and this word for this one
        what = f"The {kind.name} stream needs more memory to unpack than the {MEMORY} bytes that are allowed"
        return TooLarge(what, where, "Compress it with a smaller window or dictionary")
    behind = f", or something else lies behind its {members} members" if members else ""
    return CorruptImage(f"The {kind.name} stream is damaged{behind}: {error}", where, AGAIN)
