"""What is wrapped around an image, and taken off in the pass: compression, or an archive of one member.

    wrapping, chunks = unwrap(chunks, where)                     # recognised by content, never by a name
    for chunk in chunks: ...                                     # the bytes inside

One wrapping is taken. A new one is one line in COMPRESSIONS, or a generator like ``zip.member``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from ssvm_worker.errors import TooLarge, UnknownFormat
from ssvm_worker.units import GiB, human_size

from . import tar, zip
from .compression import COMPRESSIONS, decompress, decompress_blocks
from .exact_reader import ExactReader
from .xz_blocks import has_blocks

#: What ``recognise`` looks at; a tar's magic ends at 263, its checksum covers one block of 512.
PEEK = 512
#: Bytes that may come out of however little: below this, there is no telling a bomb from an empty disk.
UNSUSPICIOUS = 4 * GiB


def recognise(head: bytes) -> str:
    """The wrapping that begins with these PEEK bytes: gzip, bzip2, xz, zstandard, zip, tar; "" for none."""
    for each in COMPRESSIONS:
        if each.magic.match(head):
            return each.name
    if head.startswith(zip.MAGICS):
        return "zip"
    return "tar" if tar.matches(head) else ""


def peek(chunks: Iterable[bytes], size: int = PEEK) -> tuple[bytes, Iterator[bytes]]:
    """The first *size* bytes, or all there are; and all chunks again. Holds those chunks."""
    chunks, held, seen = iter(chunks), [], 0
    while seen < size and (chunk := next(chunks, b"")):
        held.append(chunk)
        seen += len(chunk)
    return b"".join(held)[:size], itertools.chain(held, chunks)


def unwrap(chunks: Iterable[bytes], where: str) -> tuple[str, Iterator[bytes]]:
    """The wrapping's name and the bytes inside; of a stream without one "" and its own bytes.

    A tar is not opened: it may be an OVA, whose members the caller must choose (see tar).
    Bytes: holds what ``decompress`` holds. Raises, from the call and from the iterator: CorruptImage for a stream that
    is cut short or damaged, or with anything behind it; UnsafeImage, UnknownFormat, TooLarge (memory).
    """
    head, chunks = peek(chunks)
    name = recognise(head)
    if name in ("", "tar"):
        return name, chunks
    if name == "zip":
        inside = zip.member(ExactReader(chunks), where)
    elif name == "xz" and has_blocks(head):
        inside = decompress_blocks(chunks, where)
    else:
        inside = decompress(chunks, name, where)
    head, inside = peek(inside)
    refuse_nested(name, head, where)
    return name, inside


def refuse_nested(name: str, head: bytes, where: str) -> None:
    """Raise UnknownFormat if what was wrapped in *name* is wrapped once more."""
    if inner := recognise(head):
        raise UnknownFormat(
            f"There is {_article(inner)} inside the {name} file; one wrapping is taken off, not two",
            where,
            f"Unpack the {name} file, and give the URL of what is in it",
        )


def _article(name: str) -> str:
    return f"{'an' if name == 'xz' else 'a'} {name} file"


def refuse_bomb(inside: Iterable[bytes], taken: Callable[[], int], max_ratio: int, where: str) -> Iterator[bytes]:
    """Pass on what comes out of a wrapping; TooLarge once it is more than max_ratio times what went in.

    *taken* says how much went in so far.
    """
    given = 0
    for chunk in inside:
        given += len(chunk)
        if given > UNSUSPICIOUS and given > taken() * max_ratio:
            raise TooLarge(
                f"{taken()} bytes have become {human_size(given)} ({given} bytes): more than {max_ratio} times as many",
                where,
                "Raise download.max_ratio in the settings, if such images are meant",
            )
        yield chunk
