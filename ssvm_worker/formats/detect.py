"""Define the terms of all formats, and run the rules of one format over the bytes of an image.

The rules of a format are a generator. It gets the head of the image. It yields each ``ImageRange`` that it needs, and
gets the bytes of this range. Then it yields the ``ImageFacts``, and gets the tail and the size at the end of the
stream. It raises an error as soon as the image breaks a rule. So the rules read like the specification, and the sizes
of the chunks cannot change a verdict.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ssvm_worker.errors import CorruptImage
from ssvm_worker.units import KiB, MiB

#: Bytes that every format gets at once. A VMDK's descriptor may end at 1 MiB + 511 bytes (qemu block/vmdk.c).
HEAD = MiB + 64 * KiB
#: Bytes of the end that are kept. A VMDK has its footer marker, footer and end-of-stream marker there.
#: A VHD has its footer in the last 512 bytes.
TAIL = 1536
#: The longest range that rules request. They read a longer table in pieces: see ``in_pieces``.
MAX_RANGE = MiB

ASK_PUBLISHER = "Download it again, or ask its publisher for a complete copy"


class ImageBytes(NamedTuple):
    """Answer to a yield of the rules: the requested bytes, or at the end the tail and the size of the image."""

    data: bytes
    size: int


@dataclass(frozen=True)
class ImageRange:
    """Range that the rules request: in the head, or behind every earlier range."""

    offset: int
    length: int
    #: The reason for the error if the image ends before. It follows "cut short: ".
    why: str = ""


@dataclass(frozen=True)
class ImageFacts:
    """Result of the rules."""

    format: str
    #: Bytes that a guest will see. 0 while it is unknown before the end of the stream.
    virtual_size: int
    details: dict[str, object] = field(default_factory=dict)


Rules = Generator[ImageRange | ImageFacts, ImageBytes, ImageFacts]


def in_pieces(offset: int, length: int, why: str = "", entry: int = 8) -> Iterator[ImageRange]:
    """Split a table into ranges of at most MAX_RANGE bytes. Each has complete entries of *entry* bytes."""
    step = MAX_RANGE // entry * entry
    for at in range(offset, offset + length, step):
        yield ImageRange(at, min(step, offset + length - at), why)


def entries(table: bytes, layout: str, empty: bytes = b"\0") -> Iterator[tuple[int, int]]:
    """Yield number and value of a table's entries. Skip entries of *empty* bytes at both ends."""
    size = struct.calcsize(layout)
    first = (len(table) - len(table.lstrip(empty))) // size
    last = -(-len(table.rstrip(empty)) // size)
    for number, (entry,) in enumerate(struct.iter_unpack(layout, table[first * size : last * size]), first):
        yield number, entry


class RuleReader:
    """Runner of one format's rules over the bytes behind the head.

    Memory: one range of at most MAX_RANGE bytes. Raises the errors of the rules. Raises CorruptImage for a range behind
    the end of the image. Raises it also for a range whose bytes have passed already.
    """

    def __init__(self, rules: Rules, head: bytes, where: str) -> None:
        self._rules = rules
        self._head = head
        self._where = where
        self._position = len(head)
        #: The first offset that the rules may still request: the bytes before it are gone.
        self._min_offset = len(head)
        self._held = bytearray()
        self.wants: ImageRange | ImageFacts = ImageRange(0, 0)
        self._advance(next(rules))

    def feed(self, chunk: bytes) -> None:
        """Pass the next bytes of the image. This costs nothing after the last range of the rules."""
        start = self._position
        self._position += len(chunk)
        while isinstance(want := self.wants, ImageRange):
            begin = want.offset + len(self._held)
            end = want.offset + want.length
            self._held += chunk[max(0, begin - start) : max(0, end - start)]
            if len(self._held) < want.length:
                return
            self._min_offset = max(self._min_offset, end)
            self._advance(self._rules.send(ImageBytes(bytes(self._held), 0)))

    def finish(self, size: int, tail: bytes) -> ImageFacts:
        """Return the facts after the end of the stream."""
        if isinstance(want := self.wants, ImageRange):
            why = want.why or f"it names {want.length} bytes at offset {want.offset}"
            raise cut_short(why, size, self._where)
        try:
            self._rules.send(ImageBytes(tail, size))
        except StopIteration as end:
            facts: ImageFacts = end.value
            return facts
        raise RuntimeError("the rules did not end after the end of the image")

    def _advance(self, want: ImageRange | ImageFacts) -> None:
        """Store the next request of the rules. Answer requests at once while the head has the bytes."""
        while isinstance(want, ImageRange):
            self._held = bytearray(self._head[want.offset : want.offset + want.length])
            if len(self._held) < want.length:
                break
            want = self._rules.send(ImageBytes(bytes(self._held), 0))
        self.wants = want
        if isinstance(want, ImageRange) and want.offset + len(self._held) < self._min_offset:
            raise CorruptImage("The tables of the image have an order that no writer uses", self._where, ASK_PUBLISHER)


def cut_short(why: str, size: int, where: str) -> CorruptImage:
    """Return the error for an image that is shorter than its header says. *why* follows a colon."""
    return CorruptImage(f"The image is cut short after {size} bytes: {why}", where, ASK_PUBLISHER)


def corrupt(what: str, where: str) -> CorruptImage:
    """Return the error for a structure that no correct writer produces."""
    return CorruptImage(what, where, ASK_PUBLISHER)
