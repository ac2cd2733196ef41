"""Decompress gzip (RFC 1952), bzip2, xz and zstandard (RFC 8878) streams of any number of members.

These rules apply to all of them:
- A missing end, a wrong checksum, or anything but zeros behind the end is an error.
- Zeros behind a member are padding (of tapes, and of xz itself).
- One step unpacks at most one chunk, for any compression ratio.
"""

from __future__ import annotations

import bz2
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from isal import igzip_lib

from ssvm_worker.errors import CorruptImage, TooLarge, WorkerError
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.units import MiB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
try:  # the extra ``xz``: liblzma 5.8 or newer, whose decoder unpacks several blocks at once. `xz -T` writes such blocks
    from lzma_mt import LZMADecompressor, is_mt_decoder_safe

    #: A transfer has two cores, and one of them hashes half of the time.
    XZ_OPTIONS: dict[str, Any] = {"threads": 2 if is_mt_decoder_safe() else 1}
except ImportError:
    from lzma import LZMADecompressor  # type: ignore[assignment]  # it has the same methods, but one thread

    XZ_OPTIONS = {}

IGZIP_ERROR: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stub says instance, not class
#: Bytes that a decoder may allocate. `xz -9` needs 65 MiB, and `zstd --ultra -22` 128 MiB.
#: The formats allow more: xz up to 4 GiB, zstandard up to 2 GiB.
MEMORY = 128 * MiB
_WINDOW_LOG = 27
#: Compressed bytes of one step. The rest of a step is copied when a member ends, so a larger step costs more for tiny
#: members. With a smaller step the calls cost more.
_STEP = 128 * 1024
AGAIN = "Download it again, or ask its publisher for a complete copy"


class Decoder(Protocol):
    """Decoder of one member, with the methods of the standard library's decompressors."""

    @property
    def eof(self) -> bool:
        """Return whether the member has ended with a correct checksum."""

    @property
    def needs_input(self) -> bool:
        """Return whether the decoder has used all of its input."""

    @property
    def unused_data(self) -> bytes:
        """Return the input behind the end of the member."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


@dataclass(frozen=True)
class Compression:
    """Kind of compressed stream."""

    name: str
    #: Matches the beginning of a member.
    magic: re.Pattern[bytes]
    decoder: Callable[[], Decoder]
    error: type[Exception]


COMPRESSIONS = (
    Compression(
        "gzip",
        re.compile(rb"\x1f\x8b\x08"),
        lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
        IGZIP_ERROR,
    ),
    # A block, or the end of an empty stream: the decimal digits of pi and of its square root.
    Compression("bzip2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", re.DOTALL), bz2.BZ2Decompressor, OSError),
    Compression(
        "xz",
        re.compile(rb"\xfd7zXZ\0"),
        lambda: LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY, **XZ_OPTIONS),
        lzma.LZMAError,
    ),
    # A frame, or a skippable frame, with which pzstd begins.
    Compression(
        "zstandard",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}),
        zstd.ZstdError,
    ),
)


def decompress(chunks: Iterable[bytes], name: str, where: str) -> Iterator[bytes]:
    """Yield the bytes inside a compressed stream.

    Memory: one chunk of input, one of output, and MEMORY for the decoder.
    Raises CorruptImage. Raises TooLarge if the decoder needs more memory.
    """
    kind = next(each for each in COMPRESSIONS if each.name == name)
    decoder, begun, members = kind.decoder(), False, 0
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


def _steps(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if len(chunk) <= _STEP:
            yield chunk
        else:
            yield from (chunk[at : at + _STEP] for at in range(0, len(chunk), _STEP))


def _damaged(kind: Compression, error: Exception, members: int, where: str) -> WorkerError:
    if "memory" in str(error).lower():  # each library has one error class, and only this text for this case
        what = f"The {kind.name} stream needs more memory to unpack than the {MEMORY} bytes that are allowed"
        return TooLarge(what, where, "Compress it with a smaller window or dictionary")
    rest = f", or other data follows its {members} members" if members else ""
    return CorruptImage(f"The {kind.name} stream is damaged{rest}: {error}", where, AGAIN)
