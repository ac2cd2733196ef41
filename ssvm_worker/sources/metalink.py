"""Metalink documents (RFC 5854): where a file may be had, how large it is, and its checksums."""

from __future__ import annotations

from urllib.parse import urlsplit
from xml.etree import ElementTree as ET
from xml.parsers import expat

from ssvm_worker.digest import HEX_LENGTHS, Digest, parse_checksum
from ssvm_worker.errors import InvalidRequest, SourceDenied

from .mirrors import Offer

#: Bytes of a document; those that distributions publish have some 50 KiB.
MOST = 1 << 20
_MOST_URLS = 100
_NAMESPACE = "{urn:ietf:params:xml:ns:metalink}"
#: RFC 5854, 4.2.16.2: 1 is the best, 999999 the worst and the default.
_WORST = 999_999


def is_metalink(url: str) -> bool:
    """Whether the URL names a metalink document rather than a file: by its ending, as RFC 5854 has it (7.1)."""
    return urlsplit(url).path.lower().endswith((".meta4", ".metalink"))


def begins_metalink(head: bytes) -> bool:
    """Whether an answer begins as a metalink does, whatever its URL and media type are; no image does."""
    head = head[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"<") and _NAMESPACE[1:-1].encode() in head


def parse_metalink(text: str, where: str) -> Offer:
    """What the document offers; SourceDenied unless it is of one file that has a URL. The URLs are not judged here."""
    root = _read(text, where)
    files = root.findall(f"{_NAMESPACE}file")
    if root.tag != f"{_NAMESPACE}metalink" or len(files) != 1:
        raise _bad(f"This is no metalink of one file: {len(files)} are in it", where)
    urls = [(_priority(each), (each.text or "").strip()) for each in files[0].findall(f"{_NAMESPACE}url")]
    ordered = dict.fromkeys(url for _, url in sorted(urls, key=lambda pair: pair[0]) if url)
    if not 0 < len(ordered) <= _MOST_URLS:
        raise _bad(f"The metalink has {len(ordered)} URLs, 1 to {_MOST_URLS} are taken", where)
    return Offer(tuple(ordered), _digests(files[0], where), _size(files[0], where))


def _read(text: str, where: str) -> ET.Element:
    """Parse without a document type: it is what entities, and attacks by them, are declared in."""
    parser, builder = expat.ParserCreate(namespace_separator="}"), ET.TreeBuilder()

    def refuse(*_: object) -> None:
        raise _bad("The metalink has a document type, which it needs for nothing good", where)

    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda tag, attributes: builder.start(_qualified(tag), attributes)
    parser.EndElementHandler = lambda tag: builder.end(_qualified(tag))
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(text.encode(), True)
        return builder.close()
    except expat.ExpatError as error:
        raise _bad(f"The metalink is no XML: {error}", where) from error


def _qualified(tag: str) -> str:
    return f"{{{tag}" if "}" in tag else tag


def _priority(url: ET.Element) -> int:
    text = url.get("priority", "")
    return int(text) if text.isdecimal() and len(text) <= 6 else _WORST


def _size(file: ET.Element, where: str) -> int | None:
    text = (file.findtext(f"{_NAMESPACE}size") or "").strip()
    if text and not (text.isdecimal() and len(text) < 20):
        raise _bad(f"The metalink gives no clear size: {text[:40]!r}", where)
    return int(text) if text else None


def _digests(file: ET.Element, where: str) -> tuple[Digest, ...]:
    """Of the whole file; algorithms that we do not know are left out, as RFC 5854 says (4.2.4)."""
    found = []
    for each in file.findall(f"{_NAMESPACE}hash"):
        algorithm = (each.get("type") or "").lower().replace("-", "")
        if algorithm in HEX_LENGTHS:
            found.append(_digest(algorithm, (each.text or "").strip(), where))
    return tuple(sorted(found, key=lambda digest: -HEX_LENGTHS[digest.algorithm]))


def _digest(algorithm: str, value: str, where: str) -> Digest:
    try:
        return parse_checksum(f"{algorithm}:{value}")
    except InvalidRequest as error:
        raise _bad(f"The metalink has a broken checksum: {error.what}", where) from error


def _bad(what: str, where: str) -> SourceDenied:
    return SourceDenied(what, where, "Give the file's own URL, and other places of it as mirrors")
