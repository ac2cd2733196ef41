"""What an image is, and whether it may be taken: judged from the bytes as they pass, never from its name.

    inspection = Inspection("qcow2", where=url)
    store_stream(chunks, sinks, observers=[inspection], ...)     # raises as soon as the verdict is certain
    info = inspection.finish()                                   # before the commit

A new format is one new file with ``matches`` and ``rules``, and one line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ssvm_worker.errors import AmbiguousFormat, InvalidRequest, TooLarge, UnknownFormat
from ssvm_worker.units import TiB, human_size

from . import iso, qcow2, raw, vhd, vhdx, vmdk
from .detect import HEAD, TAIL, ImageFacts, RuleReader, Rules
from .refused import refuse_foreign, refuse_text

if TYPE_CHECKING:
    from .second_opinion import SecondOpinion


@dataclass(frozen=True)
class Format:
    """One format that is taken."""

    name: str
    #: Whether the head of an image (HEAD bytes, or all there is) is of this format.
    matches: Callable[[bytes], bool]
    #: The generator that judges it, from its head and a name for error texts.
    rules: Callable[[bytes, str], Rules]


FORMATS = (
    Format("qcow2", qcow2.matches, qcow2.rules),
    Format("vmdk", vmdk.matches, vmdk.rules),
    Format("vhd", vhd.matches, vhd.rules),
    Format("vhdx", vhdx.matches, vhdx.rules),
    Format("iso", iso.matches, iso.rules),
)
RAW = Format("raw", lambda _: True, raw.rules)
#: What a request may ask for; upper case, as CloudStack writes it, is the same. An OVA is a package of images: see ova.
NAMES = ("auto", *(each.name for each in FORMATS), RAW.name, "ova")


@dataclass(frozen=True)
class ImageInfo:
    """The verdict on an image that may be taken."""

    #: qcow2 | vmdk | vhd | vhdx | iso | raw
    format: str
    #: Bytes that a guest will see.
    virtual_size: int
    #: Bytes of the file.
    physical_size: int
    #: What else is known: version, subformat, create_type, partition_table (mbr | gpt | none), …
    details: dict[str, object] = field(default_factory=dict)


def parse_format(text: str) -> str:
    """The format that a request asks for, in our spelling; InvalidRequest for what is not taken."""
    name = text.strip().lower() or "auto"
    if name in NAMES:
        return name
    raise InvalidRequest("Unknown image format", ascii(text[:40]), f"Give one of {', '.join(NAMES)}")


def guess_format(head: bytes) -> str:
    """The format that an image seems to have, good for a file's name alone; raw where nothing else fits."""
    return next((each.name for each in FORMATS if each.matches(head)), RAW.name)


class Inspection:
    """An observer of chunks that recognises and judges one image.

    Bytes: holds HEAD (about 1 MiB; three times that while it decides), a tail of 1.5 KiB and 2 MiB of a table at the
    most, twice while it is read. Behind the head a chunk costs half a microsecond: those of 64 KiB and more are as
    good as free. Raises, from the call or from ``finish``: UnknownFormat, AmbiguousFormat, UnsafeImage, TooLarge,
    CorruptImage; the constructor: InvalidRequest. The verdict does not depend on the chunks.
    """

    def __init__(self, expected: str = "auto", max_virtual_size: int = 64 * TiB, where: str = "") -> None:
        self._expected = parse_format(expected)
        self._max_virtual_size = max_virtual_size
        self._where = where
        self._size = 0
        self._head = bytearray()
        self._tail = b""
        self._reading: RuleReader | None = None
        self._format = RAW
        self._second: SecondOpinion | None = None

    def __call__(self, chunk: bytes) -> None:
        self._size += len(chunk)
        self._tail = chunk[-TAIL:] if len(chunk) >= TAIL else (self._tail + chunk)[-TAIL:]
        if self._reading is None:
            room = HEAD - len(self._head)
            self._head += chunk[:room]
            if len(self._head) < HEAD:
                return
            self._decide()
            chunk = chunk[room:]
        self._read_on(chunk)

    def finish(self) -> ImageInfo:
        """The verdict, now that all bytes have passed; call it once, before anything is committed."""
        if self._reading is None:
            self._decide()
        assert self._reading is not None
        assert self._second is not None
        facts = self._reading.finish(self._size, self._tail)
        tail = self._tail if self._size > HEAD else b""
        if facts.format == "vmdk" and len(self._tail) == TAIL:  # oslo.utils refuses bytes in the padding of a marker
            tail = vmdk.without_padding(self._tail)
        self._second.check(tail, self._where)
        if facts.format not in ("raw", "vhd") and vhd.is_fixed(self._tail, self._size):
            raise self._ambiguous({facts.format, "vhd"})
        self._refuse_unless_expected(facts.format)
        self._refuse_large(facts.virtual_size)
        return ImageInfo(facts.format, facts.virtual_size, self._size, facts.details)

    def _decide(self) -> None:
        """The head is there: say which format this is, and let its rules judge."""
        head = bytes(self._head)
        self._head.clear()
        refuse_foreign(head, self._where)
        found = [each for each in FORMATS if each.matches(head)]
        names = {each.name for each in found}
        # oslo takes a tenth of a second to import, which no other command should wait for.
        from .second_opinion import SecondOpinion

        self._second = SecondOpinion(head)
        if len(found) > 1 or (names - {"iso"} and raw.partition_table(head)[0] != "none"):
            raise self._ambiguous(names if len(found) > 1 else names | {"a partitioned disk"})
        self._format = found[0] if found else RAW
        if self._format is not RAW or self._expected != "vhd":  # only its end can tell a fixed VHD
            self._refuse_unless_expected(self._format.name)
        if self._format is RAW and self._expected == "auto":
            refuse_text(head, self._where)
        self._reading = RuleReader(self._format.rules(head, self._where), head, self._where)
        if unseen := self._second.formats() - {self._format.name}:
            raise self._ambiguous({self._format.name} | unseen)
        self._read_on(b"")

    def _read_on(self, chunk: bytes) -> None:
        assert self._reading is not None
        self._reading.feed(chunk)
        wants = self._reading.wants
        if isinstance(wants, ImageFacts):
            so_far = self._size - vhd.FOOTER  # the last sector may be a fixed VHD's footer, and no part of the disk
            self._refuse_large(wants.virtual_size or so_far)

    def _refuse_unless_expected(self, name: str) -> None:
        if self._expected not in ("auto", name):
            raise UnknownFormat(
                f"The image is {name}, but {self._expected} was asked for",
                self._where,
                f"Ask for {name} or auto, if this is the image that you mean",
            )

    def _refuse_large(self, virtual_size: int) -> None:
        if virtual_size > self._max_virtual_size:
            raise TooLarge(
                f"The disk has {human_size(virtual_size)}; {human_size(self._max_virtual_size)} are allowed",
                self._where,
                "Raise the limit in the settings, or take a smaller image",
            )

    def _ambiguous(self, names: set[str]) -> AmbiguousFormat:
        return AmbiguousFormat(
            f"The image is {' and '.join(sorted(names))} at once",
            self._where,
            "Such a file can attack one reader behind another's back: ask its publisher for a clean one",
        )
