"""The terms that ``formats`` and its modules share, and the reader that gives a format's rules the passing bytes.

The rules of a format are a generator. They get the head of the image. They yield each ``ImageRange`` that they need
and get its bytes. Then they yield the ``ImageFacts`` and get the tail and the size at the end of the stream. They raise
our errors as soon as they know them. So the rules read like the specification, and chunk sizes cannot change a verdict.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ssvm_worker.errors import CorruptImage
from ssvm_worker.units import KiB, MiB

#: What every format gets at once. A VMDK's descriptor may end 1 MiB + 511 bytes into the file (qemu block/vmdk.c).
HEAD = MiB + 64 * KiB
#: What is kept of the end: a VMDK's footer marker, footer and end-of-stream marker; a VHD's footer is the last 512.
TAIL = 1536
#: The longest range that rules ask for. They read a longer table in pieces: see ``in_pieces``.
MAX_RANGE = MiB

ASK_PUBLISHER = "Download it again, or ask its publisher for a whole one"


class ImageBytes(NamedTuple):
    """What rules get for a yield: the bytes asked for; at the end the tail, and the size of the whole image."""

    data: bytes
    size: int


@dataclass(frozen=True)
class ImageRange:
    """Bytes of the image that rules want to see: in the head, or behind every range asked for before."""

    offset: int
    length: int
    #: What the image promises there, for the error if it ends before; it follows "cut short: ".
    why: str = ""


@dataclass(frozen=True)
class ImageFacts:
    """What the rules have found."""

    format: str
    #: Bytes that a guest will see; 0 while only the end of the stream can tell.
    virtual_size: int
    details: dict[str, object] = field(default_factory=dict)


Rules = Generator[ImageRange | ImageFacts, ImageBytes, ImageFacts]


def in_pieces(offset: int, length: int, why: str = "", entry: int = 8) -> Iterator[ImageRange]:
    """Split a table of any length into ranges, each of whole entries of *entry* bytes; MAX_RANGE bytes are held."""
    step = MAX_RANGE // entry * entry
    for at in range(offset, offset + length, step):
        yield ImageRange(at, min(step, offset + length - at), why)


def entries(table: bytes, layout: str, empty: bytes = b"\0") -> Iterator[tuple[int, int]]:
    """Yield number and value of a table's entries, without those of *empty* bytes at either end."""
    size = struct.calcsize(layout)
    first = (len(table) - len(table.lstrip(empty))) // size
    last = -(-len(table.rstrip(empty)) // size)
    for number, (entry,) in enumerate(struct.iter_unpack(layout, table[first * size : last * size]), first):
        yield number, entry


class RuleReader:
    """Runs one format's rules over the bytes behind the head.

    Bytes: holds one range, MAX_RANGE at the most. Raises: what the rules raise; CorruptImage for a range that the
    image does not have, or that lies before one already passed.
    """

    def __init__(self, rules: Rules, head: bytes, where: str) -> None:
        self._rules = rules
        self._head = head
        self._where = where
        self._position = len(head)
        self._floor = len(head)
        self._held = bytearray()
        self.wants: ImageRange | ImageFacts = ImageRange(0, 0)
        self._ask(next(rules))

    def feed(self, chunk: bytes) -> None:
        """Show the next bytes of the image; costs nothing once the rules only wait for the end."""
        start = self._position
        self._position += len(chunk)
        while isinstance(want := self.wants, ImageRange):
            begin = want.offset + len(self._held)
            end = want.offset + want.length
            self._held += chunk[max(0, begin - start) : max(0, end - start)]
            if len(self._held) < want.length:
                return
            self._floor = max(self._floor, end)
            self._ask(self._rules.send(ImageBytes(bytes(self._held), 0)))

    def finish(self, size: int, tail: bytes) -> ImageFacts:
        """The facts, now that the stream has ended."""
        if isinstance(want := self.wants, ImageRange):
            why = want.why or f"it names {want.length} bytes at offset {want.offset}"
            raise cut_short(why, size, self._where)
        try:
            self._rules.send(ImageBytes(tail, size))
        except StopIteration as end:
            facts: ImageFacts = end.value
            return facts
        raise RuntimeError("rules went on after the end of the image")

    def _ask(self, want: ImageRange | ImageFacts) -> None:
        """Take the next wish of the rules, and serve it at once as long as the head holds what they want."""
        while isinstance(want, ImageRange):
            self._held = bytearray(self._head[want.offset : want.offset + want.length])
            if len(self._held) < want.length:
                break
            want = self._rules.send(ImageBytes(bytes(self._held), 0))
        self.wants = want
        if isinstance(want, ImageRange) and want.offset + len(self._held) < self._floor:
            raise CorruptImage("Its tables lie in an order that no writer uses", self._where, ASK_PUBLISHER)


def cut_short(why: str, size: int, where: str) -> CorruptImage:
    """The error for an image that is shorter than it says itself; *why* goes on after a colon."""
    return CorruptImage(f"The image is cut short after {size} bytes: {why}", where, ASK_PUBLISHER)


def corrupt(what: str, where: str) -> CorruptImage:
    """The error for a structure that no sane writer produces."""
    return CorruptImage(what, where, ASK_PUBLISHER)
