"""Read metalink documents: the URLs of a file, its size and its checksums.

Version 4 (.meta4) is RFC 5854. openSUSE's and other mirror services still publish the older version 3 (.metalink):

    <metalink version="3.0" xmlns="http://www.metalinker.org/"> <files> <file name="…"> <size>…</size>
        <verification> <hash type="sha256">…   <resources> <url type="http" preference="100">…
"""

from __future__ import annotations

from urllib.parse import urlsplit
from xml.etree import ElementTree as ET
from xml.parsers import expat

from ssvm_worker.artifacts.checksums import HEX_LENGTHS, Digest, algorithm_of, parse_checksum
from ssvm_worker.errors import InvalidRequest, SourceDenied

from .options import Offer

#: The largest document in bytes. Documents of distributions have about 50 KiB.
MAX_BYTES = 1 << 20
_MAX_URLS = 100
_NAMESPACE = "{urn:ietf:params:xml:ns:metalink}"
_NAMESPACE_3 = "{http://www.metalinker.org/}"
#: RFC 5854, 4.2.16.2: 1 is the best priority. 999999 is the worst one and the default.
_WORST = 999_999
#: Types of URLs in version 3 that lead to the file itself. Other types are torrents, for example.
_PLAIN_TYPES = ("", "http", "https", "ftp", "sftp")


def is_metalink(url: str) -> bool:
    """Return whether the file extension in the URL is that of a metalink."""
    return urlsplit(url).path.lower().endswith((".meta4", ".metalink"))


def begins_metalink(head: bytes) -> bool:
    """Return whether the first bytes are those of a metalink. The URL and the media type do not count."""
    head = head[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"<") and any(each[1:-1].encode() in head for each in (_NAMESPACE, _NAMESPACE_3))


def parse_metalink(text: str, where: str) -> Offer:
    """Return the offer in the document, without checking its URLs.

    Raises SourceDenied unless the document describes one file that has a URL.
    """
    root = _parse(text, where)
    is_old = root.tag == f"{_NAMESPACE_3}metalink"
    space = _NAMESPACE_3 if is_old else _NAMESPACE
    files = root.findall(f"{space}files/{space}file" if is_old else f"{space}file")
    if root.tag != f"{space}metalink" or len(files) != 1:
        raise _bad(f"The metalink must describe one file. It describes {len(files)}", where)
    found = files[0].findall(f"{space}resources/{space}url" if is_old else f"{space}url")
    urls = [each for each in found if not is_old or each.get("type", "").lower() in _PLAIN_TYPES]
    ordered = dict.fromkeys(filter(None, ((each.text or "").strip() for each in sorted(urls, key=_priority))))
    if not 0 < len(ordered) <= _MAX_URLS:
        raise _bad(f"The metalink has {len(ordered)} URLs. 1 to {_MAX_URLS} are allowed", where)
    size = (files[0].findtext(f"{space}size") or "").strip()
    if size and not (size.isdecimal() and len(size) < 20):
        raise _bad(f"The size in the metalink is not a number: {size[:40]!r}", where)
    hashes = files[0].findall(f"{space}verification/{space}hash" if is_old else f"{space}hash")
    return Offer(tuple(ordered), _digests(hashes, where), int(size) if size else None)


def _parse(text: str, where: str) -> ET.Element:
    """Parse the document and refuse a document type: it could declare entities that attack the parser."""
    # The text is decoded already. The encoding that the document declares does not count.
    parser, builder = expat.ParserCreate("utf-8", "}"), ET.TreeBuilder()

    def refuse(*_: object) -> None:
        raise _bad("The metalink has a document type, which is not allowed", where)

    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda tag, attributes: builder.start(_qualified(tag), attributes)
    parser.EndElementHandler = lambda tag: builder.end(_qualified(tag))
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(text.encode(), True)
        return builder.close()
    except expat.ExpatError as error:
        raise _bad(f"The metalink is not valid XML: {error}", where) from error


def _qualified(tag: str) -> str:
    return f"{{{tag}" if "}" in tag else tag


def _priority(url: ET.Element) -> int:
    """Return a sort key, best first. Version 4 counts up from 1, version 3 counts down from 100."""
    text, preference = url.get("priority", ""), url.get("preference", "")
    if preference.isdecimal() and len(preference) <= 3:
        return _WORST - int(preference)
    return int(text) if text.isdecimal() and len(text) <= 6 else _WORST


def _digests(hashes: list[ET.Element], where: str) -> tuple[Digest, ...]:
    """Return the digests of the whole file, the longest first. Ignore unknown algorithms (RFC 5854, 4.2.4)."""
    found = []
    for each in hashes:
        if algorithm := algorithm_of(each.get("type") or ""):
            try:
                found.append(parse_checksum(f"{algorithm}:{(each.text or '').strip()}"))
            except InvalidRequest as error:
                raise _bad(f"The metalink has an invalid checksum: {error.what}", where) from error
    return tuple(sorted(found, key=lambda digest: -HEX_LENGTHS[digest.algorithm]))


def _bad(what: str, where: str) -> SourceDenied:
    return SourceDenied(what, where, "Give the URL of the file itself, and its other URLs as mirrors")
