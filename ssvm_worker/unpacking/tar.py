"""Tar archives, read as they come: POSIX.1-2017 pax, and the GNU and old forms of it.

    0 name · 124 size (octal, or base 256) · 148 checksum · 156 type · 257 "ustar" · 345 prefix      blocks of 512

Regular files alone are taken: no link, device, directory or sparse file, no name twice, no path. Nothing is extracted;
the caller reads a member's bytes before it asks for the next.

Two blocks of zeros end an archive. Some writers leave them out, and other readers do not ask for them. An archive that
ends behind a member is taken if nothing can be missing: it has one member, or an OVA's ``.mf``, which names them all.
AppleDouble files (``._NAME``), which the tar of macOS adds, are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ssvm_worker.errors import CorruptImage, UnsafeImage
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.units import KiB

from .compression import AGAIN
from .exact_reader import ExactReader

BLOCK = 512
#: An OVA has an OVF, a manifest, a certificate and its disks; vSphere's VMs have 60 disks and more at the most.
MAX_MEMBERS = 256
#: A pax header holds a name and some times.
_MAX_HEADER = 64 * KiB
_REGULAR = (b"0", b"\0", b"7")
_REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
            b"5": "a directory", b"6": "a pipe", b"S": "a sparse file", b"K": "a link"}  # fmt: skip
_PLAIN = "Pack plain files, without directories: tar --format=ustar -cf NAME.ova NAME.ovf NAME.mf DISK…"


@dataclass(frozen=True)
class TarMember:
    """One regular file of the archive."""

    name: str
    size: int
    #: Its bytes; all of them must be taken before the next member.
    chunks: Iterator[bytes]


def matches(head: bytes) -> bool:
    """Whether a tar begins so: its magic, or a header of the old form, told by its checksum."""
    return head.startswith(b"ustar", 257) or (len(head) >= BLOCK and _sound(head[:BLOCK]))


def members(pull: ExactReader, where: str) -> Iterator[TarMember]:
    """The members, in their order.

    Raises UnsafeImage for what is no regular file or has a path; CorruptImage for an archive that is cut short,
    damaged, or has bytes other than zeros behind its end.
    """
    seen: set[str] = set()

    def may_end() -> bool:
        files = [name for name in seen if not name.startswith("._")]
        return len(files) == 1 or any(name.endswith(".mf") for name in files)

    try:
        while header := _next_header(pull, where, may_end):
            name, size = header
            if len(seen) >= MAX_MEMBERS or name.lower() in seen:
                what = f"more than {MAX_MEMBERS} members" if len(seen) >= MAX_MEMBERS else f"two members named {name!a}"
                raise UnsafeImage(f"The tar archive has {what}", where, _PLAIN)
            seen.add(name.lower())
            end = pull.position + size
            content = _content(pull, size, where)
            if name.startswith("._"):
                deque(content, maxlen=0)
            else:
                yield TarMember(name, size, content)
            if pull.position != end:
                raise RuntimeError(f"the member {name!a} was not read to its end")
            pull.exactly(-size % BLOCK)
        while rest := pull.some():
            if rest.strip(b"\0"):
                raise CorruptImage("Something lies behind the end of the tar archive", where, AGAIN)
    except EOFError as error:
        raise CorruptImage(f"The tar archive is cut short: {error}", where, AGAIN) from error


def _content(pull: ExactReader, left: int, where: str) -> Iterator[bytes]:
    while left:
        chunk = pull.some(min(left, CHUNK))
        if not chunk:
            raise CorruptImage(f"The tar archive is cut short: {left} bytes are missing of a member", where, AGAIN)
        left -= len(chunk)
        yield chunk


def _next_header(pull: ExactReader, where: str, may_end: Callable[[], bool]) -> tuple[str, int] | None:
    """Name and size of the next member, with what extended headers say; None at the end of the archive.

    *may_end* says whether the archive may end here without a block of zeros.
    """
    said: dict[str, str] = {}
    kinds: set[bytes] = set()
    while True:
        if not (start := pull.some(BLOCK)) and not kinds and may_end():
            return None
        block = start + pull.exactly(BLOCK - len(start))
        if not block.strip(b"\0"):
            return None
        if not _sound(block):
            raise CorruptImage("A header of the tar archive has a wrong checksum", where, AGAIN)
        kind, size = block[156:157], _number(block[124:136], where)
        if kind not in (b"x", b"g", b"L"):
            break
        if kind in kinds or size > _MAX_HEADER:
            raise UnsafeImage("The tar archive has an oversized header, or one of a kind twice", where, _PLAIN)
        kinds.add(kind)
        said |= _extended(kind, pull.exactly(size), where)
        pull.exactly(-size % BLOCK)
    if kind not in _REGULAR:
        what = _REFUSED.get(kind, f"a member of type {kind!a}")
        raise UnsafeImage(f"The tar archive holds {what}: {_name(block)!a}", where, _PLAIN)
    name = said.get("path") or _name(block)
    return _checked(name, where), _number(said["size"].encode(), where, 10) if "size" in said else size


def _extended(kind: bytes, data: bytes, where: str) -> dict[str, str]:
    """The records of a pax header (``LENGTH KEY=VALUE\\n``), or a GNU long name."""
    if kind == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "replace")}
    records: dict[str, str] = {}
    while data.strip(b"\0"):
        length, blank, _ = data.partition(b" ")
        size = _number(length, where, 10) if blank else 0
        key, equals, value = data[len(length) + 1 : size].decode("utf-8", "replace").partition("=")
        if not len(length) < size <= len(data) or not equals or not value.endswith("\n"):
            raise CorruptImage("The tar archive has a damaged pax header", where, AGAIN)
        if key.startswith("GNU.sparse."):
            raise UnsafeImage("The tar archive holds a sparse file", where, _PLAIN)
        records[key] = value[:-1]
        data = data[size:]
    # A global header could rename every member at once; only its times and comments are of use.
    return {} if kind == b"g" else records


def _name(block: bytes) -> str:
    name, prefix = (field.split(b"\0")[0] for field in (block[:100], block[345:500]))
    ustar = block[257:263] == b"ustar\0"  # GNU's own form, "ustar ", has times where the prefix is
    return (prefix + b"/" + name if ustar and prefix else name).decode("utf-8", "replace")


def _checked(name: str, where: str) -> str:
    """The name, which may stand in references but is no path; ``./`` before it is how `tar -C DIR .` writes it."""
    plain = name.removeprefix("./")
    if not plain or plain in (".", "..") or not plain.isprintable() or set(plain) & set("/\\") or len(plain) > 255:
        raise UnsafeImage(f"The tar archive has a member with a path: {name[:80]!a}", where, _PLAIN)
    return plain


def _number(field: bytes, where: str, base: int = 8) -> int:
    """A number of a header: digits, or base 256 with the top bit set (GNU). Never below zero, nor above 2^62."""
    try:
        if field[:1] == b"\x80":
            value = int.from_bytes(field[1:], "big")
        else:
            digits = field.strip(b" \0")
            value = int(digits or b"0", base) if digits.isdigit() or not digits else -1
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 62:
        raise CorruptImage(f"The tar archive has a member of size {field[:40]!a}", where, AGAIN)
    return value


def _sound(block: bytes) -> bool:
    """Whether the checksum is right: the sum of all bytes, its own field taken as blanks (some old tars sign them)."""
    digits = block[148:156].strip(b" \0")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        return False
    rest = block[:148] + block[156:]
    signed = sum(rest) - 256 * sum(each > 127 for each in rest)
    return int(digits, 8) - 256 in (sum(rest), signed)
