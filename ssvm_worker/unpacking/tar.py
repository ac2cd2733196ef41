"""Read a tar archive while it passes: POSIX.1-2017 pax, and the GNU and old forms of it.

    0 name · 124 size (octal, or base 256) · 148 checksum · 156 type · 257 "ustar" · 345 prefix      blocks of 512

Only regular files are accepted: no link, device, directory or sparse file, no name twice, no path. Nothing is
extracted. The caller reads a member's bytes before it asks for the next member.

Two blocks of zeros end an archive. Some writers omit them, and other readers do not require them. An archive may end
behind a member if none can be missing: it has one member, or an OVA's ``.mf``, which lists all members.
AppleDouble files (``._NAME``), which the tar of macOS adds, are skipped.
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
#: An OVA has an OVF, a manifest, a certificate and its disks. A VM of vSphere has 60 disks or a few more.
MAX_MEMBERS = 256
#: A pax header has a name and some times.
_MAX_HEADER = 64 * KiB
_REGULAR = (b"0", b"\0", b"7")
_REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
            b"5": "a directory", b"6": "a pipe", b"S": "a sparse file", b"K": "a link"}  # fmt: skip
_PLAIN = "Pack plain files, without directories: tar --format=ustar -cf NAME.ova NAME.ovf NAME.mf DISK…"


@dataclass(frozen=True)
class TarMember:
    """Regular file of the archive."""

    name: str
    size: int
    #: Its bytes. The caller must read all of them before the next member.
    chunks: Iterator[bytes]


def matches(head: bytes) -> bool:
    """Return whether a tar begins with these bytes: a magic, or a header of the old form with a correct checksum."""
    return head.startswith(b"ustar", 257) or (len(head) >= BLOCK and _has_valid_checksum(head[:BLOCK]))


def members(reader: ExactReader, where: str) -> Iterator[TarMember]:
    """Yield the members in order.

    Raises UnsafeImage for a member that is not a regular file or has a path.
    Raises CorruptImage if the archive is cut short or damaged, or if bytes other than zeros follow its end.
    """
    seen: set[str] = set()

    def may_end() -> bool:
        files = [name for name in seen if not name.startswith("._")]
        return len(files) == 1 or any(name.endswith(".mf") for name in files)

    try:
        while header := _next_header(reader, where, may_end):
            name, size = header
            if len(seen) >= MAX_MEMBERS or name.lower() in seen:
                what = f"more than {MAX_MEMBERS} members" if len(seen) >= MAX_MEMBERS else f"two members named {name!a}"
                raise UnsafeImage(f"The tar archive has {what}", where, _PLAIN)
            seen.add(name.lower())
            end = reader.position + size
            content = _content(reader, size, where)
            if name.startswith("._"):
                deque(content, maxlen=0)
            else:
                yield TarMember(name, size, content)
            if reader.position != end:
                raise RuntimeError(f"the member {name!a} was not read to its end")
            reader.exactly(-size % BLOCK)
        while rest := reader.some():
            if rest.strip(b"\0"):
                raise CorruptImage("Data follows the end of the tar archive", where, AGAIN)
    except EOFError as error:
        raise CorruptImage(f"The tar archive is cut short: {error}", where, AGAIN) from error


def _content(reader: ExactReader, remaining: int, where: str) -> Iterator[bytes]:
    while remaining:
        chunk = reader.some(min(remaining, CHUNK))
        if not chunk:
            what = f"The tar archive is cut short: {remaining} bytes of a member are missing"
            raise CorruptImage(what, where, AGAIN)
        remaining -= len(chunk)
        yield chunk


def _next_header(reader: ExactReader, where: str, may_end: Callable[[], bool]) -> tuple[str, int] | None:
    """Return name and size of the next member, or None at the end of the archive. Extended headers are applied.

    *may_end* returns whether the archive may end here without a block of zeros.
    """
    extended: dict[str, str] = {}
    kinds: set[bytes] = set()
    while True:
        if not (start := reader.some(BLOCK)) and not kinds and may_end():
            return None
        block = start + reader.exactly(BLOCK - len(start))
        if not block.strip(b"\0"):
            return None
            return None
        if not _has_valid_checksum(block):
            raise CorruptImage("A header of the tar archive has a wrong checksum", where, AGAIN)
        kind, size = block[156:157], _number(block[124:136], where)
        if kind not in (b"x", b"g", b"L"):
            break
        if kind in kinds or size > _MAX_HEADER:
            raise UnsafeImage("The tar archive has an oversized header, or two headers of a kind", where, _PLAIN)
        kinds.add(kind)
        extended |= _extended(kind, reader.exactly(size), where)
        reader.exactly(-size % BLOCK)
    if kind not in _REGULAR:
        what = _REFUSED.get(kind, f"a member of type {kind!a}")
        raise UnsafeImage(f"The tar archive holds {what}: {_name(block)!a}", where, _PLAIN)
    name = extended.get("path") or _name(block)
    return _plain_name(name, where), _number(extended["size"].encode(), where, 10) if "size" in extended else size


def _extended(kind: bytes, data: bytes, where: str) -> dict[str, str]:
    r"""Return the records of a pax header (``LENGTH KEY=VALUE\n``), or a GNU long name."""
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
    # A global header could rename every member at once. Its other records, times and comments, are not needed.
    return {} if kind == b"g" else records


def _name(block: bytes) -> str:
    name, prefix = (field.split(b"\0")[0] for field in (block[:100], block[345:500]))
    ustar = block[257:263] == b"ustar\0"  # GNU's own form, "ustar ", has times instead of the prefix
    return (prefix + b"/" + name if ustar and prefix else name).decode("utf-8", "replace")


def _plain_name(name: str, where: str) -> str:
    """Return the name without ``./``, which `tar -C DIR .` writes. Raises UnsafeImage for a path."""
    plain = name.removeprefix("./")
    if not plain or plain in (".", "..") or not plain.isprintable() or set(plain) & set("/\\") or len(plain) > 255:
        raise UnsafeImage(f"The tar archive has a member with a path: {name[:80]!a}", where, _PLAIN)
    return plain


def _number(field: bytes, where: str, base: int = 8) -> int:
    """Parse a number: digits, or base 256 if the top bit is set (GNU). Raises CorruptImage if it is not below 2^62."""
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


def _has_valid_checksum(block: bytes) -> bool:
    """Return whether the checksum is correct: the sum of all bytes, with blanks in its own field.

    Some old tars sum signed bytes.
    """
    digits = block[148:156].strip(b" \0")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        return False
    rest = block[:148] + block[156:]
    signed = sum(rest) - 256 * sum(each > 127 for each in rest)
    return int(digits, 8) - 256 in (sum(rest), signed)
