"""Where downloads come from: one way in for each URL scheme."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.errors import InvalidRequest, SourceDenied
from ssvm_worker.net.urls import parse
from ssvm_worker.streaming.pipeline import limit

from .file import FileSource, FileVersion
from .ftp import FtpSource, FtpVersion
from .http.source import HttpSource, Validator, fetch_text
from .metalink import MOST, begins_metalink, is_metalink, parse_metalink
from .mirrors import Mirrors, Offer
from .options import SourceOptions, VersionedSource
from .sftp import SftpSource, SftpVersion
from .store_object import StoredSource

_Open = Callable[[str, SourceOptions, dict[str, Any] | None], VersionedSource]


def _http(url: str, access: SourceOptions, validator: dict[str, Any] | None) -> VersionedSource:
    known = Validator(**validator) if validator else None
    return HttpSource(url, access.http, headers=access.headers, check=access.check, validator=known)


def _file(url: str, access: SourceOptions, validator: dict[str, Any] | None) -> VersionedSource:
    return FileSource(url, access, FileVersion(**validator) if validator else None)


def _ftp(url: str, access: SourceOptions, validator: dict[str, Any] | None) -> VersionedSource:
    return FtpSource(url, access, FtpVersion(**validator) if validator else None)


def _sftp(url: str, access: SourceOptions, validator: dict[str, Any] | None) -> VersionedSource:
    return SftpSource(url, access, SftpVersion(**validator) if validator else None)


def _stored(url: str, access: SourceOptions, _: dict[str, Any] | None) -> VersionedSource:
    return StoredSource(url, access)


#: A new source is one new file, and one line here.
SCHEMES: dict[str, _Open] = {
    "http": _http,
    "https": _http,
    "file": _file,
    "ftp": _ftp,
    "sftp": _sftp,
    "scp": _sftp,
    "s3": _stored,
    "store": _stored,
}
#: Those that a metalink may name.
_PUBLIC = ("http", "https", "ftp")


def open_source(url: str, access: SourceOptions, validator: dict[str, Any] | None = None) -> VersionedSource:
    """The source behind a URL, of the version that *validator* tells; InvalidRequest for a scheme that is not taken.

    Touches nothing.
    """
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise InvalidRequest(
            f"URLs of scheme {scheme[:20]!r} are not taken", "url", f"Give one of: {', '.join(SCHEMES)}"
        )
    return SCHEMES[scheme](url, access, validator)


def find_source(
    urls: Sequence[str], access: SourceOptions, checksum: Digest | None, version: dict[str, Any] | None = None
) -> Mirrors:
    """The object that the first URL names, or any other; a metalink is fetched and stands for what it offers.

    Headers and credentials go to the first URL's origin only. Raises InvalidRequest, and what ``fetch_text`` raises.
    """
    bare = dataclasses.replace(access, http=access.http.elsewhere(), headers={}, username=None, password=None)

    def make(url: str, validator: dict[str, Any] | None) -> VersionedSource:
        return open_source(url, access if url == urls[0] else bare, validator)

    for url in urls:
        make(url, None)

    def unfold(head: bytes, rest: Iterator[bytes]) -> Offer | None:
        return known(_unfolded(head, rest, urls)) if begins_metalink(head) else None

    def known(offer: Offer) -> Offer:
        return dataclasses.replace(offer, verified=checksum is not None or bool(offer.digests))

    if not is_metalink(urls[0]):
        return Mirrors(known(Offer(tuple(dict.fromkeys(urls)))), make, version, unfold)
    text = fetch_text(urls[0], access.http, headers=access.headers, check=access.check, most=MOST)
    return Mirrors(known(_offered(text, urls)), make, version)


def _unfolded(head: bytes, rest: Iterator[bytes], urls: Sequence[str]) -> Offer:
    """What a metalink offers that was not known for one by its name."""
    document = b"".join(limit(itertools.chain([head], rest), MOST, parse(urls[0]).name))
    return _offered(document.decode("utf-8", "replace"), urls)


def _offered(text: str, urls: Sequence[str]) -> Offer:
    """What a metalink at the first URL offers; the other URLs come behind what it names."""
    first, *others = urls
    offer = parse_metalink(text, parse(first).name)
    taken = [url for url in offer.urls if _is_taken(url)]
    if not taken:
        raise SourceDenied("The metalink has no URL that we take", parse(first).name, "Give the file's own URL")
    return dataclasses.replace(offer, urls=tuple(dict.fromkeys((*taken, *others))))


def _is_taken(url: str) -> bool:
    """Whether a stranger's document may name that URL: nothing of this machine, and nothing by our own credentials."""
    if url.partition(":")[0].lower() not in _PUBLIC:
        return False
    try:
        open_source(url, SourceOptions())
    except InvalidRequest:
        return False
    return True
