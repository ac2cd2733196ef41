"""Metalink documents: where a file may be had, how large it is, and its checksums.

Version 4 is RFC 5854 (.meta4). Version 3 (.metalink) is older, and openSUSE's and other mirror services still give it:

    <metalink version="3.0" xmlns="http://www.metalinker.org/"> <files> <file name="…"> <size>…</size>
        <verification> <hash type="sha256">…   <resources> <url type="http" preference="100">…
"""

from __future__ import annotations

from urllib.parse import urlsplit
from xml.etree import ElementTree as ET
from xml.parsers import expat

from ssvm_worker.artifacts.checksums import HEX_LENGTHS, Digest, algorithm_of, parse_checksum
from ssvm_worker.errors import InvalidRequest, SourceDenied

from .mirrors import Offer

#: Bytes of a document; those that distributions publish have some 50 KiB.
MOST = 1 << 20
_MOST_URLS = 100
_NAMESPACE = "{urn:ietf:params:xml:ns:metalink}"
_NAMESPACE_3 = "{http://www.metalinker.org/}"
#: RFC 5854, 4.2.16.2: 1 is the best, 999999 the worst and the default.
_WORST = 999_999
#: Of version 3's URLs, the types that are of the file itself; others are torrents and the like.
_PLAIN_TYPES = ("", "http", "https", "ftp", "sftp")


def is_metalink(url: str) -> bool:
    """Tell whether the URL names a metalink document rather than a file, by its ending."""
    return urlsplit(url).path.lower().endswith((".meta4", ".metalink"))


def begins_metalink(head: bytes) -> bool:
    """Whether an answer begins as a metalink does, whatever its URL and media type are; no image does."""
    head = head[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"<") and any(each[1:-1].encode() in head for each in (_NAMESPACE, _NAMESPACE_3))


def parse_metalink(text: str, where: str) -> Offer:
    """What the document offers; SourceDenied unless it is of one file that has a URL. The URLs are not judged here."""
    root = _read(text, where)
    is_old = root.tag == f"{_NAMESPACE_3}metalink"
    space = _NAMESPACE_3 if is_old else _NAMESPACE
    files = root.findall(f"{space}files/{space}file" if is_old else f"{space}file")
    if root.tag != f"{space}metalink" or len(files) != 1:
        raise _bad(f"This is no metalink of one file: {len(files)} are in it", where)
    found = files[0].findall(f"{space}resources/{space}url" if is_old else f"{space}url")
    urls = [each for each in found if not is_old or each.get("type", "").lower() in _PLAIN_TYPES]
    ordered = dict.fromkeys(filter(None, ((each.text or "").strip() for each in sorted(urls, key=_priority))))
    if not 0 < len(ordered) <= _MOST_URLS:
        raise _bad(f"The metalink has {len(ordered)} URLs, 1 to {_MOST_URLS} are taken", where)
    hashes = files[0].findall(f"{space}verification/{space}hash" if is_old else f"{space}hash")
    return Offer(tuple(ordered), _digests(hashes, where), _size(files[0].findtext(f"{space}size"), where))


def _read(text: str, where: str) -> ET.Element:
    """Parse without a document type: it is what entities, and attacks by them, are declared in."""
    # The text is decoded already, whatever encoding the document declares.
    parser, builder = expat.ParserCreate("utf-8", "}"), ET.TreeBuilder()

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
    """The best first: version 4 counts up from 1, version 3 down from 100."""
    text, preference = url.get("priority", ""), url.get("preference", "")
    if preference.isdecimal() and len(preference) <= 3:
        return _WORST - int(preference)
    return int(text) if text.isdecimal() and len(text) <= 6 else _WORST


def _size(told: str | None, where: str) -> int | None:
    text = (told or "").strip()
    if text and not (text.isdecimal() and len(text) < 20):
        raise _bad(f"The metalink gives no clear size: {text[:40]!r}", where)
    return int(text) if text else None


def _digests(hashes: list[ET.Element], where: str) -> tuple[Digest, ...]:
    """Of the whole file; algorithms that we do not know are left out, as RFC 5854 says (4.2.4)."""
    found = []
    for each in hashes:
        if algorithm := algorithm_of(each.get("type") or ""):
            found.append(_digest(algorithm, (each.text or "").strip(), where))
    return tuple(sorted(found, key=lambda digest: -HEX_LENGTHS[digest.algorithm]))


def _digest(algorithm: str, value: str, where: str) -> Digest:
    try:
        return parse_checksum(f"{algorithm}:{value}")
    except InvalidRequest as error:
        raise _bad(f"The metalink has a broken checksum: {error.what}", where) from error


def _bad(what: str, where: str) -> SourceDenied:
    return SourceDenied(what, where, "Give the file's own URL, and other places of it as mirrors")
