"""Read the mounts of this host from /proc/self/mountinfo. proc(5) describes the fields."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")
#: Escapes of space, tab, newline and backslash in a path or a source.
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    id: int
    #: Major and minor number: st_dev of the files in the mount.
    device: tuple[int, int]
    #: The mounted directory of the file system. NFS always has ``/`` here, and the path in the source.
    root: str
    point: str
    fstype: str
    source: str
    #: Options of the file system, for example ``vers=4.2``. An option without a value has an empty value.
    options: dict[str, str] = field(compare=False)


def mounts(path: Path = _MOUNTINFO) -> list[Mount]:
    """Return all mounts that this process sees. A mount that covers another comes after it."""
    found = []
    for line in path.read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        try:
            # Between the sixth field and the dash there may be any number of optional fields.
            dash = fields.index("-", 6)
            fstype, source, options = fields[dash + 1 : dash + 4]
            major, _, minor = fields[2].partition(":")
            pairs = (each.partition("=") for each in options.split(",") if each)
            mount = Mount(
                id=int(fields[0]),
                device=(int(major), int(minor)),
                root=_unescaped(fields[3]),
                point=_unescaped(fields[4]),
                fstype=fstype,
                source=_unescaped(source),
                options={name: value for name, _, value in pairs},
            )
        except ValueError:
            continue  # an unknown line of a later kernel
        found.append(mount)
    return found


def _unescaped(field: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field)
