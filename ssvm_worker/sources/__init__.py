"""Open the source of a download: one source class for each URL scheme."""

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
from .metalink import MAX_BYTES, begins_metalink, is_metalink, parse_metalink
from .mirrors import Mirrors, Offer
from .options import SourceOptions, VersionedSource
from .sftp import SftpSource, SftpVersion
from .store_object import StoredSource

__all__ = ["SCHEMES", "SourceOptions", "find_source", "open_source"]

_Open = Callable[[str, SourceOptions, dict[str, Any] | None], VersionedSource]


def _http(url: str, options: SourceOptions, version: dict[str, Any] | None) -> VersionedSource:
    validator = Validator(**version) if version else None
    return HttpSource(url, options.http, headers=options.headers, check=options.check, validator=validator)


def _sftp(url: str, options: SourceOptions, version: dict[str, Any] | None) -> VersionedSource:
    return SftpSource(url, options, SftpVersion(**version) if version else None)


#: A new source is one new file and one line here. `jobs.download.request` lists the schemes that a request may name.
SCHEMES: dict[str, _Open] = {
    "http": _http,
    "https": _http,
    "file": lambda url, options, version: FileSource(url, options, FileVersion(**version) if version else None),
    "ftp": lambda url, options, version: FtpSource(url, options, FtpVersion(**version) if version else None),
    "sftp": _sftp,
    "scp": _sftp,
    "s3": lambda url, options, _: StoredSource(url, options),
    "store": lambda url, options, _: StoredSource(url, options),
}
#: The schemes that a metalink may name.
_PUBLIC = ("http", "https", "ftp")


def open_source(url: str, options: SourceOptions, validator: dict[str, Any] | None = None) -> VersionedSource:
    """Return the source behind a URL, without a connection.

    *validator* names the version of the object, if an earlier attempt has stored one.
    Raises InvalidRequest for a scheme that is not supported.
    """
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise InvalidRequest(
            f"The URL scheme {scheme[:20]!r} is not supported", "url", f"Use one of {', '.join(SCHEMES)}"
        )
    return SCHEMES[scheme](url, options, validator)


def find_source(
    urls: Sequence[str], options: SourceOptions, checksum: Digest | None, version: dict[str, Any] | None = None
) -> Mirrors:
    """Return one source for all *urls*, which must offer the same object.

    If the first URL is a metalink, the function fetches it and uses the URLs in it.
    Headers and credentials are sent to the origin of the first URL only.
    Raises InvalidRequest, and the errors of ``fetch_text``.
    """
    without_secrets = dataclasses.replace(
        options, http=options.http.without_client_certificate(), headers={}, username=None, password=None
    )

    def make(url: str, validator: dict[str, Any] | None) -> VersionedSource:
        return open_source(url, options if url == urls[0] else without_secrets, validator)

    for url in urls:
        make(url, None)

    def with_checksum(offer: Offer) -> Offer:
        return dataclasses.replace(offer, verified=checksum is not None or bool(offer.digests))

    def unfold(head: bytes, rest: Iterator[bytes]) -> Offer | None:
        """Return the offer of a metalink whose URL does not look like one."""
        if not begins_metalink(head):
            return None
        document = b"".join(limit(itertools.chain([head], rest), MAX_BYTES, parse(urls[0]).name))
        return with_checksum(_offer_of(document.decode("utf-8", "replace"), urls))

    if not is_metalink(urls[0]):
        return Mirrors(with_checksum(Offer(tuple(dict.fromkeys(urls)))), make, version, unfold)
    text = fetch_text(urls[0], options.http, headers=options.headers, check=options.check, max_bytes=MAX_BYTES)
    return Mirrors(with_checksum(_offer_of(text, urls)), make, version)


def _offer_of(text: str, urls: Sequence[str]) -> Offer:
    """Return the offer of the metalink at the first URL. The other URLs follow the URLs in the document."""
    first, *others = urls
    offer = parse_metalink(text, parse(first).name)
    allowed = [url for url in offer.urls if _is_allowed_in_metalink(url)]
    if not allowed:
        raise SourceDenied(
            "The metalink has no URL that is allowed",
            parse(first).name,
            f"Give the URL of the file itself. A metalink may name {', '.join(_PUBLIC)}",
        )
    return dataclasses.replace(offer, urls=tuple(dict.fromkeys((*allowed, *others))))


def _is_allowed_in_metalink(url: str) -> bool:
    """Return whether a metalink, which is untrusted, may name this URL.

    It may not name files of this machine, nor objects that need the worker's own credentials.
    """
    if url.partition(":")[0].lower() not in _PUBLIC:
        return False
    try:
        open_source(url, SourceOptions())
    except InvalidRequest:
        return False
    return True
