"""Open the source of a download: a class for each URL scheme, and ``Mirrors`` for an object that several URLs offer.

If one URL fails or is slow, ``Mirrors`` continues with the next.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from ssvm_worker.artifacts.checksums import Digest, digest_of
from ssvm_worker.errors import (
    InvalidRequest,
    SourceChanged,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    WorkerError,
)
from ssvm_worker.net.urls import parse
from ssvm_worker.streaming.pipeline import limit

from .file import FileSource, FileVersion
from .ftp import FtpSource, FtpVersion
from .http.source import HttpSource, Validator, fetch_text
from .metalink import MAX_BYTES, begins_metalink, is_metalink, parse_metalink
from .options import Offer, SourceOptions, VersionedSource
from .sftp import SftpSource, SftpVersion
from .store_object import StoredSource

__all__ = ["SCHEMES", "Mirrors", "Offer", "SourceOptions", "find_source", "open_source"]

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
#: Creates the source behind a URL. The dict is the validator of the version, if it is known.
Make = Callable[[str, dict[str, Any] | None], VersionedSource]
_FAILURES = (SourceUnavailable, SourceNotFound, SourceDenied, SourceChanged)
_CHECK_MIRROR = "Check the mirror, and the announced size"
#: Gets the first chunk and the rest. If they are a metalink, it returns the offer in it.
Unfold = Callable[[bytes, Iterator[bytes]], Offer | None]


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


@dataclass(frozen=True)
class MirrorVersion:
    """Mirror that delivered the first bytes, and its version. A draft manifest stores it as JSON."""

    #: Fingerprint of the URL.
    place: str
    validator: dict[str, Any]


class Mirrors:
    """``Source`` that reads the first mirror that works. It contacts another mirror only after a failure."""

    def __init__(
        self, offer: Offer, make: Make, version: dict[str, Any] | None = None, unfold: Unfold = lambda *_: None
    ) -> None:
        """Select the first mirror, or the one in *version*: the ``validator`` of an earlier attempt as a dict."""
        self._make = make
        self._unfold = unfold
        self._start(offer, version)

    def _start(self, offer: Offer, version: dict[str, Any] | None) -> None:
        #: Checksums that came with the URLs. Those of a metalink are known after the first chunk.
        self.digests = offer.digests
        self._offer = offer
        #: Bytes per second of each mirror that was judged, by its index.
        self._rates: dict[int, float] = {}
        fingerprints = [_fingerprint(url) for url in offer.urls]
        known = version if version and version.get("place") in fingerprints else None
        self._index = fingerprints.index(known["place"]) if known else 0
        self._source = self._make(offer.urls[self._index], known["validator"] if known else None)
        self.name = self._source.name
        self._size: int | None = offer.size
        #: Whether nothing is known about the current mirror yet, though bytes of another one may be stored.
        self._is_new = False

    @property
    def size(self) -> int | None:
        """Return the bytes of the object, which are the same on each mirror."""
        return self._size if self._size is not None else self._source.size

    @property
    def resumable(self) -> bool:
        """Return whether the current mirror is resumable, or another one may continue because of a checksum."""
        return self._source.resumable or (self._offer.verified and len(self._offer.urls) > 1)

    @property
    def validator(self) -> MirrorVersion | None:
        """Return the current mirror and its version."""
        inner = self._source.validator
        return MirrorVersion(_fingerprint(self._offer.urls[self._index]), dataclasses.asdict(inner)) if inner else None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on, and try each mirror once.

        After the first chunk, a change of the mirror raises SourceUnavailable. The caller resumes, and the next call
        continues with the new mirror. If all mirrors fail, the method raises a retryable error if there is one.
        Raises SourceChanged if only another mirror could continue, but there is no checksum.
        """
        position, errors = offset, list[WorkerError]()
        while True:
            try:
                for chunk in self._read(position):
                    position += len(chunk)
                    yield chunk
                self._compare_end(position)
                return
            except _Unfolded as document:
                self._unfold = lambda *_: None  # follow one metalink, not a chain of them
                self._start(document.offer, None)
            except _Slow:
                self._switch(self._faster(), position)
                raise self._switched("Another mirror may be faster") from None
            except _FAILURES as error:
                if position > offset and self._source.resumable:
                    raise  # the mirror worked until now: the caller resumes with it first
                errors.append(error)
                if error.retryable and not self._may_switch(position):
                    raise  # another attempt may succeed, here or from the first byte on
                if len(errors) >= len(self._offer.urls):
                    raise next((each for each in errors if each.retryable), error) from None
                self._switch((self._index + 1) % len(self._offer.urls), position)
                if position > offset:
                    raise self._switched(error.what) from error

    def _switched(self, why: str) -> SourceUnavailable:
        return SourceUnavailable(why, self.name, "Check the mirrors")

    def _read(self, position: int) -> Generator[bytes, None, None]:
        if position and self._is_new:
            self._probe()
        started, waited, read = time.monotonic(), 0.0, 0
        with closing(self._source.open(position)) as chunks:
            for chunk in chunks:
                waited, read = waited + time.monotonic() - started, read + len(chunk)
                if position + read == len(chunk):
                    if offer := self._unfold(chunk, chunks):
                        raise _Unfolded(offer)
                    self._compare_size()
                yield chunk
                if waited >= self._offer.judge_s and self._index not in self._rates:
                    self._judge(read / waited, position + read)
                started = time.monotonic()

    def _probe(self) -> None:
        """Read size and version of a new mirror from its first chunk."""
        with closing(self._source.open()) as chunks:
            next(chunks, b"")
        self._compare_size()
        if not self._source.resumable or self._source.size is None:
            raise SourceChanged("The mirror cannot resume the object", self._source.name, "Submit the job again")
        self._is_new = False

    def _compare_size(self) -> None:
        size = self._source.size
        if self._size is not None and size is not None and self._size != size:
            what = f"The file has {size} bytes there, {self._size} were expected"
            raise SourceChanged(what, self._source.name, _CHECK_MIRROR)

    def _compare_end(self, position: int) -> None:
        if self._size is not None and position != self._size:
            what = f"The file ended at {position}, {self._size} bytes were announced"
            raise SourceChanged(what, self._source.name, _CHECK_MIRROR)

    def _judge(self, rate: float, position: int) -> None:
        self._rates[self._index] = rate
        known = position == 0 or self.size is not None
        if rate < self._offer.slow and self._faster() != self._index and known and self._may_switch(position):
            raise _Slow

    def _faster(self) -> int:
        """Return the index of a mirror that was not tried yet, or of the fastest one."""
        indexes = range(len(self._offer.urls))
        untried = [each for each in indexes if each not in self._rates]
        return untried[0] if untried else max(indexes, key=lambda index: self._rates[index])

    def _may_switch(self, position: int) -> bool:
        return position == 0 or self._offer.verified

    def _switch(self, index: int, position: int) -> None:
        """Select another mirror. After the first byte this needs a checksum and the same size."""
        if not self._may_switch(position):
            what = "The mirror of the first bytes is unavailable. Without a checksum, no other mirror can continue"
            raise SourceChanged(what, self._source.name, "Give a checksum, or submit the job again to start over")
        self._size, self._index = self.size, index
        self._source = self._make(self._offer.urls[index], None)
        self._is_new = True


def _fingerprint(url: str) -> str:
    """Return a hash that identifies a URL without its secrets."""
    return digest_of(url.encode()).hex[:32]


class _Slow(Exception):
    """Another place may be faster."""


class _Unfolded(Exception):
    """The object is a metalink: it names the URLs of the file."""

    def __init__(self, offer: Offer) -> None:
        super().__init__()
        self.offer = offer
