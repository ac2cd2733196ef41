"""Read OVA packages: the OVF descriptor (DMTF DSP0243), which lists the disks, and the ``.mf`` with their digests.

    <Envelope> <References> <File id="file1" href="disk-1.vmdk" size="…"/>     attributes may have a namespace
               <DiskSection> <Disk diskId="vmdisk1" fileRef="file1" capacity="…"/>

The descriptor is untrusted. It must have:
- no document type (and so no inner or outer entities),
- no inclusions, and no deep nesting,
- no references except to files beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape, unescape
from urllib.parse import unquote
from xml.etree import ElementTree as Xml

from ssvm_worker.artifacts.checksum_files import decode_text
from ssvm_worker.artifacts.checksums import HEX_LENGTHS, Digest, algorithm_of, hex_of
from ssvm_worker.errors import CorruptImage, UnknownFormat, UnsafeImage
from ssvm_worker.units import MiB

from .detect import ASK_PUBLISHER

#: The largest descriptor or checksum file that is read. Real ones have about 20 KiB.
MAX_TEXT = MiB
_MAX_DEPTH = 64
_MAX_FILES = 256
#: A document type, or any other declaration except a comment and CDATA.
_DECLARATION = re.compile(r"<!(?!--|\[CDATA\[)")
#: The worker reads no inclusions. But it stores the descriptor unchanged, and another reader may follow them.
_INCLUDE = "{http://www.w3.org/2001/XInclude}"
_HREF = re.compile(r"""(\bhref\s*=\s*)(["'])(.*?)\2""", re.DOTALL)
_FILE = re.compile(r"<(?:[\w.-]+:)?File\b[^>]*>")
_SIZE = re.compile(r"""(\bsize\s*=\s*)(["'])\d+\2""")
_CHECKSUM = re.compile(r"([A-Za-z][\w/-]*)\s*\((?:\./)?(.+)\)\s*=\s*([0-9a-fA-F]+)")
#: Algorithms of a ``.mf`` (DSP0243).
ALGORITHMS = ("sha1", "sha256", "sha512")
_EXPORT = "Export the VM again as an OVA, e.g. with ovftool"


@dataclass(frozen=True)
class Descriptor:
    """Files that an OVF lists."""

    #: Files of the disks, in the order of the disks. Names as in the package, not as the OVF encodes them.
    disks: tuple[str, ...]
    #: Other files: NVRAM, ISO images.
    others: tuple[str, ...]


def is_descriptor(name: str) -> bool:
    """Return whether a member with this name is an OVF."""
    return name.lower().endswith(".ovf")


def read_descriptor(data: bytes, where: str) -> Descriptor:
    """Check an OVF. Raises UnsafeImage for an attack or a reference outside, CorruptImage if it is not an OVF."""
    root = parse(data, where)
    if local_name(root.tag) != "Envelope":
        raise CorruptImage("The OVF has no Envelope", where, ASK_PUBLISHER)
    files = _names_by_id(root, where)
    disks: dict[str, str] = {}
    for disk in (each for each in root.iter() if local_name(each.tag) == "Disk"):
        values = attributes_of(disk)
        if "parentRef" in values:
            raise UnsafeImage("The OVF has a disk that is a delta of another", where, _EXPORT)
        if reference := values.get("fileRef"):
            if reference not in files or reference in disks:
                what = f"The OVF has no file {reference[:80]!a} for a disk, or two disks use it"
                raise CorruptImage(what, where, ASK_PUBLISHER)
            disks[reference] = files[reference]
    if not disks:
        raise UnknownFormat("The OVF has no disks", where, _EXPORT)
    others = tuple(href for id_, href in files.items() if id_ not in disks)
    return Descriptor(tuple(disks.values()), others)


def read_sizes(data: bytes, where: str) -> dict[str, int]:
    """Return the bytes of each file by name, if the OVF states them."""
    files = [attributes_of(each) for each in parse(data, where).iter() if local_name(each.tag) == "File"]
    return {
        file_name(each["href"]): int(each["size"])
        for each in files
        if "href" in each and each.get("size", "").isdecimal()
    }


def _names_by_id(root: Xml.Element, where: str) -> dict[str, str]:
    files: dict[str, str] = {}
    for each in (each for section in root if local_name(section.tag) == "References" for each in section):
        values = attributes_of(each)
        id_, href = values.get("id", ""), values.get("href", "")
        name = file_name(href)
        if not name or not name.isprintable() or set(name) & set("/\\:%") or name in (".", ".."):
            raise UnsafeImage(f"The OVF points outside its package: {href[:80]!a}", where, _EXPORT)
        if values.get("compression", "identity") not in ("", "identity") or values.get("chunkSize", "0") != "0":
            raise UnknownFormat(f"The OVF has a file that is compressed or in chunks: {href[:80]!a}", where, _EXPORT)
        if not id_ or id_ in files or name in files.values() or len(files) >= _MAX_FILES:
            raise UnsafeImage(f"The OVF names a file twice, or more than {_MAX_FILES}: {href[:80]!a}", where, _EXPORT)
        files[id_] = name
    return files


def file_name(href: str) -> str:
    """Return the file that an href names: a relative-path reference of RFC 3986 (DSP0243, ovf:href), decoded once.

    The caller must check the name. Bytes that are not UTF-8 become surrogates, which are not printable.
    """
    return unquote(href, errors="surrogateescape")


def parse(data: bytes, where: str) -> Xml.Element:
    """Return the tree of an OVF. Raise UnsafeImage or CorruptImage as ``read_descriptor``.

    The declared encoding is ignored, because it can hide a declaration from a check.
    """
    try:
        text = data.decode("utf-8-sig")
        if _DECLARATION.search(text):
            raise UnsafeImage("The OVF has a document type, which can name entities and files", where, _EXPORT)
        parser: Xml.XMLPullParser[Xml.Element] = Xml.XMLPullParser(("start", "end"))
        depth, root = 0, None
        for event, element in _events(parser, text):
            depth += 1 if event == "start" else -1
            root = element if root is None else root
            if element.tag.startswith(_INCLUDE):
                raise UnsafeImage("The OVF includes other files (XInclude)", where, _EXPORT)
            if depth > _MAX_DEPTH:
                raise UnsafeImage(f"The OVF is nested deeper than {_MAX_DEPTH} elements", where, _EXPORT)
        parser.close()
    except (UnicodeDecodeError, Xml.ParseError, ValueError) as error:
        raise CorruptImage(f"The OVF cannot be read: {error}", where, ASK_PUBLISHER) from error
    assert isinstance(root, Xml.Element)  # otherwise close() had raised an error
    return root


def _events(parser: Xml.XMLPullParser[Xml.Element], text: str) -> Iterator[tuple[str, Xml.Element]]:
    """Yield starts and ends of elements during parsing, so that deep nesting is refused before it is built."""
    for at in range(0, len(text), 4096):
        parser.feed(text[at : at + 4096])
        yield from parser.read_events()  # type: ignore[misc]  # only these two kinds were asked for


def local_name(tag: object) -> str:
    """Return the name of an element or attribute without its namespace."""
    return str(tag).rpartition("}")[2]


def attributes_of(element: Xml.Element) -> dict[str, str]:
    """Return the attributes of an element by their names without namespaces."""
    return {local_name(name): value for name, value in element.attrib.items()}


def renamed(data: bytes, names: Mapping[str, str], where: str) -> bytes:
    """Return the OVF with other file names, and no other change. *names* has the new name for each old name.

    A new name must need no URI encoding.
    """

    def rename(match: re.Match[str]) -> str:
        before, quote, href = match.groups()
        return f"{before}{quote}{escape(names.get(file_name(unescape(href)), unescape(href)))}{quote}"

    result = _HREF.sub(rename, data.decode("utf-8-sig")).encode()
    old, new = read_descriptor(data, where), read_descriptor(result, where)
    if new != Descriptor(tuple(names[each] for each in old.disks), tuple(names[each] for each in old.others)):
        raise CorruptImage("The files of the OVF cannot be renamed", where, _EXPORT)
    return result


def resized(data: bytes, sizes: Mapping[str, int], where: str) -> bytes:
    """Return the OVF with other sizes where it states them, and no other change. *sizes* are bytes by name."""

    def resize(match: re.Match[str]) -> str:
        href = _HREF.search(match[0])
        size = sizes.get(file_name(unescape(href[3]))) if href else None
        return match[0] if size is None else _SIZE.sub(rf"\g<1>\g<2>{size}\g<2>", match[0])

    result = _FILE.sub(resize, data.decode("utf-8-sig")).encode()
    old = read_sizes(data, where)
    if read_sizes(result, where) != old | {name: size for name, size in sizes.items() if name in old}:
        raise CorruptImage("The sizes in the OVF cannot be changed", where, _EXPORT)
    return result


def read_checksums(data: bytes, where: str) -> dict[str, Digest]:
    """Read the digests of a ``.mf`` by file: lines of ``SHA256(disk-1.vmdk)= HEX``.

    Tools name an algorithm in several ways, and may write several digests for a file. The strongest counts.
    Raises CorruptImage for an unknown line, a file with unknown algorithms only, and two digests by one algorithm.
    """
    found: dict[str, Digest] = {}
    others: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for line in filter(None, (each.strip() for each in decode_text(data).splitlines())):
        match = _CHECKSUM.fullmatch(line)
        if not match:
            raise _line_error(line, where)
        algorithm, name = algorithm_of(match[1]), match[2]
        if algorithm not in ALGORITHMS:
            others[name] = line
            continue
        digits = hex_of(match[3], algorithm)
        if digits is None or (name, algorithm) in seen:
            raise _line_error(line, where)
        seen.add((name, algorithm))
        if name not in found or HEX_LENGTHS[algorithm] > HEX_LENGTHS[found[name].algorithm]:
            found[name] = Digest(algorithm, digits)
    for name in others.keys() - found.keys():
        raise _line_error(others[name], where)
    return found


def _line_error(line: str, where: str) -> CorruptImage:
    what = f"The .mf has a line of no known form or algorithm, or one twice: {line[:80]!a}"
    return CorruptImage(what, where, ASK_PUBLISHER)


def write_checksums(digests: Mapping[str, Digest]) -> bytes:
    """Return a ``.mf`` of SHA-256 digests by name."""
    return "".join(f"SHA256({name})= {digest.hex}\n" for name, digest in digests.items()).encode()
