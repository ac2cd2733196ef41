"""Recognise the format of a disk image, and refuse an unsafe or damaged one.

The bytes decide, as they pass. The name of the file does not count.

    inspection = Inspection("qcow2", where=url)
    store_stream(chunks, sinks, observers=[inspection], ...)     # raises an error early
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
    """Supported format."""

    name: str
    #: Returns whether the head of an image is of this format. The head has HEAD bytes, or the whole image.
    matches: Callable[[bytes], bool]
    #: Returns the generator that checks the image. The arguments are the head, and a name for error texts.
    rules: Callable[[bytes, str], Rules]


FORMATS = (
    Format("qcow2", qcow2.matches, qcow2.rules),
    Format("vmdk", vmdk.matches, vmdk.rules),
    Format("vhd", vhd.matches, vhd.rules),
    Format("vhdx", vhdx.matches, vhdx.rules),
    Format("iso", iso.matches, iso.rules),
)
RAW = Format("raw", lambda _: True, raw.rules)
#: Formats that a request may name, in lower or upper case (as CloudStack does). An OVA is a package of images: see ova.
NAMES = ("auto", *(each.name for each in FORMATS), RAW.name, "ova")


@dataclass(frozen=True)
class ImageInfo:
    """Verdict on an accepted image."""

    #: qcow2 | vmdk | vhd | vhdx | iso | raw
    format: str
    #: Bytes that a guest will see.
    virtual_size: int
    #: Bytes of the file.
    physical_size: int
    #: Further facts: version, subformat, create_type, partition_table (mbr | gpt | none), …
    details: dict[str, object] = field(default_factory=dict)


def parse_format(text: str) -> str:
    """Return the format that a request names, in lower case. Raises InvalidRequest for an unknown format."""
    name = text.strip().lower() or "auto"
    if name in NAMES:
        return name
    raise InvalidRequest("Unknown image format", ascii(text[:40]), f"Give one of {', '.join(NAMES)}")


def guess_format(head: bytes) -> str:
    """Return the probable format, or raw. The result is good only for the name of a file: nothing was checked."""
    return next((each.name for each in FORMATS if each.matches(head)), RAW.name)


class Inspection:
    """Observer of chunks that recognises and checks one image.

    Memory:
    - HEAD (about 1 MiB), and three times that during recognition,
    - a tail of 1.5 KiB,
    - at most 2 MiB of a table, and twice that while the table is read.

    After the head, a chunk costs half a microsecond. For chunks of 64 KiB and more this is negligible.

    The call and ``finish`` raise UnknownFormat, AmbiguousFormat, UnsafeImage, TooLarge or CorruptImage. The constructor
    raises InvalidRequest. The verdict does not depend on the sizes of the chunks.
    """

    def __init__(self, expected: str = "auto", max_virtual_size: int = 64 * TiB, where: str = "") -> None:
        self._expected = parse_format(expected)
        self._max_virtual_size = max_virtual_size
        self._where = where
        self._size = 0
        self._head = bytearray()
        self._tail = b""
        self._reader: RuleReader | None = None
        self._format = RAW
        self._second_opinion: SecondOpinion | None = None

    def __call__(self, chunk: bytes) -> None:
        self._size += len(chunk)
        self._tail = chunk[-TAIL:] if len(chunk) >= TAIL else (self._tail + chunk)[-TAIL:]
        if self._reader is None:
            missing = HEAD - len(self._head)
            self._head += chunk[:missing]
            if len(self._head) < HEAD:
                return
            self._recognise()
            chunk = chunk[missing:]
        self._feed(chunk)

    def finish(self) -> ImageInfo:
        """Return the verdict. Call this once, after all bytes and before a commit."""
        if self._reader is None:
            self._recognise()
        assert self._reader is not None
        assert self._second_opinion is not None
        facts = self._reader.finish(self._size, self._tail)
        tail = self._tail if self._size > HEAD else b""
        if facts.format == "vmdk" and len(self._tail) == TAIL:  # oslo.utils refuses bytes in the padding of a marker
            tail = vmdk.without_padding(self._tail)
        self._second_opinion.check(tail, self._where)
        if facts.format not in ("raw", "vhd") and vhd.is_fixed(self._tail, self._size):
            raise self._ambiguous({facts.format, "vhd"})
        self._refuse_unless_expected(facts.format)
        self._refuse_large(facts.virtual_size)
        return ImageInfo(facts.format, facts.virtual_size, self._size, facts.details)

    def _recognise(self) -> None:
        """Find the format from the head, and start its rules."""
        head = bytes(self._head)
        self._head.clear()
        refuse_foreign(head, self._where)
        found = [each for each in FORMATS if each.matches(head)]
        names = {each.name for each in found}
        # The import of oslo takes a tenth of a second. Other commands should not wait for it.
        from .second_opinion import SecondOpinion

        self._second_opinion = SecondOpinion(head)
        if len(found) > 1 or (names - {"iso"} and raw.partition_table(head)[0] != "none"):
            raise self._ambiguous(names if len(found) > 1 else names | {"a partitioned disk"})
        self._format = found[0] if found else RAW
        if self._format is not RAW or self._expected != "vhd":  # a fixed VHD is recognised at the end
            self._refuse_unless_expected(self._format.name)
        if self._format is RAW and self._expected == "auto":
            refuse_text(head, self._where)
        self._reader = RuleReader(self._format.rules(head, self._where), head, self._where)
        if unseen := self._second_opinion.formats() - {self._format.name}:
            raise self._ambiguous({self._format.name} | unseen)
        self._feed(b"")

    def _feed(self, chunk: bytes) -> None:
        assert self._reader is not None
        self._reader.feed(chunk)
        facts = self._reader.wants
        if isinstance(facts, ImageFacts):
            size_so_far = self._size - vhd.FOOTER  # the last sector may be the footer of a fixed VHD
            self._refuse_large(facts.virtual_size or size_so_far)

    def _refuse_unless_expected(self, name: str) -> None:
        if self._expected not in ("auto", name):
            raise UnknownFormat(
                f"The image is {name}, but {self._expected} was asked for",
                self._where,
                f"If this is the right image, ask for {name} or auto",
            )

    def _refuse_large(self, virtual_size: int) -> None:
        if virtual_size > self._max_virtual_size:
            raise TooLarge(
                f"The disk has {human_size(virtual_size)}; {human_size(self._max_virtual_size)} are allowed",
                self._where,
                "Raise the limit in the settings, or use a smaller image",
            )

    def _ambiguous(self, names: set[str]) -> AmbiguousFormat:
        return AmbiguousFormat(
            f"The image is {' and '.join(sorted(names))} at once",
            self._where,
            "Another reader could see another disk in it. Ask its publisher for a clean image",
        )
