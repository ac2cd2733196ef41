"""Unpack an image while it passes: a compressed stream, or an archive of one member.

    wrapping, chunks = unwrap(chunks, where)                     # recognised by content, never by a name
    for chunk in chunks: ...                                     # the bytes inside

Only one wrapping is removed. A new compression is one line in COMPRESSIONS. A new archive is a generator like
``zip.member``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ssvm_worker.errors import TooLarge, UnknownFormat
from ssvm_worker.streaming.pipeline import first_bytes
from ssvm_worker.units import GiB, human_size

from . import tar, zip
from .compression import COMPRESSIONS, decompress
from .exact_reader import ExactReader

#: Bytes that ``recognise`` needs. A tar's magic ends at 263, and its checksum covers one block of 512.
PEEK = 512
#: Up to this size the ratio is not checked: an empty disk compresses as well as a decompression bomb.
UNSUSPICIOUS = 4 * GiB


def recognise(head: bytes) -> str:
    """Return the wrapping of a file with these PEEK bytes: gzip, bzip2, xz, zstandard, zip, tar, or "" for none."""
    for each in COMPRESSIONS:
        if each.magic.match(head):
            return each.name
    if head.startswith(zip.MAGICS):
        return "zip"
    return "tar" if tar.matches(head) else ""


def unwrap(chunks: Iterable[bytes], where: str) -> tuple[str, Iterator[bytes]]:
    """Return the name of the wrapping and the bytes inside. Without a wrapping, return "" and the same bytes.

    A tar is not opened: it may be an OVA, whose members the caller chooses (see ``tar``).
    Memory: that of ``decompress``.
    The call and the iterator raise:
    - CorruptImage if the stream is cut short or damaged, or if bytes follow its end,
    - UnsafeImage, UnknownFormat,
    - TooLarge if the decoder needs too much memory.
    """
    head, chunks = first_bytes(chunks, PEEK)
    name = recognise(head)
    if name in ("", "tar"):
        return name, chunks
    inside = zip.member(ExactReader(chunks), where) if name == "zip" else decompress(chunks, name, where)
    head, inside = first_bytes(inside, PEEK)
    refuse_nested(name, head, where)
    return name, inside


def refuse_nested(name: str, head: bytes, where: str) -> None:
    """Raise UnknownFormat if the content of the *name* file is wrapped again."""
    if inner := recognise(head):
        article = "an" if inner == "xz" else "a"
        raise UnknownFormat(
            f"There is {article} {inner} file inside the {name} file. Only one wrapping is removed",
            where,
            f"Unpack the {name} file, and give the URL of the file inside",
        )


def refuse_bomb(inside: Iterable[bytes], packed_size: Callable[[], int], max_ratio: int, where: str) -> Iterator[bytes]:
    """Yield the unpacked chunks. Raise TooLarge if they exceed *max_ratio* times the packed bytes.

    *packed_size* returns the packed bytes that were read so far.
    """
    unpacked = 0
    for chunk in inside:
        unpacked += len(chunk)
        packed = packed_size()
        if unpacked > UNSUSPICIOUS and unpacked > packed * max_ratio:
            raise TooLarge(
                f"{packed} bytes unpack to {human_size(unpacked)} ({unpacked} bytes): more than {max_ratio} times"
                " as many",
                where,
                "If the file is trusted, raise download.max_ratio in the settings",
            )
        yield chunk
