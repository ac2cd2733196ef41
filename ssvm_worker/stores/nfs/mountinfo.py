"""What is mounted, from /proc/self/mountinfo, by its fields: proc(5) says what each is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PLACE = Path("/proc/self/mountinfo")
#: Blank, tab, line break and backslash in a path or a source.
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line."""

    id: int
    #: Major and minor, as st_dev of what lies in it has them.
    device: tuple[int, int]
    #: Which directory of the file system is mounted; NFS says ``/`` always, and tells its path in the source.
    root: str
    point: str
    fstype: str
    source: str
    #: Of the file system, as ``vers=4.2``; an option without a value has an empty one.
    options: dict[str, str] = field(compare=False)


def mounts(place: Path = _PLACE) -> list[Mount]:
    """All mounts that this process sees, what lies on top of another behind it."""
    return list(_parsed(place.read_text(errors="surrogateescape")))


def _parsed(text: str) -> Iterator[Mount]:
    for line in text.splitlines():
        fields = line.split(" ")
        try:
            # The optional fields between the sixth and the dash are none, one or many.
            dash = fields.index("-", 6)
            fstype, source, options = fields[dash + 1 : dash + 4]
            yield Mount(
                id=int(fields[0]),
                device=_device(fields[2]),
                root=_plain(fields[3]),
                point=_plain(fields[4]),
                fstype=fstype,
                source=_plain(source),
                options=_options(options),
            )
        except ValueError:
            continue  # a line of a later kernel, or none of ours


def _plain(field: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field)


def _device(field: str) -> tuple[int, int]:
    major, _, minor = field.partition(":")
    return int(major), int(minor)


def _options(text: str) -> dict[str, str]:
    pairs = (each.partition("=") for each in text.split(",") if each)
    return {name: value for name, _, value in pairs}
