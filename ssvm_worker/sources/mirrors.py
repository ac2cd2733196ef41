"""Read one object that several URLs offer. If one URL fails or is slow, continue with the next."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from ssvm_worker.artifacts.checksums import Digest, digest_of
from ssvm_worker.errors import SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable, WorkerError
from ssvm_worker.units import MiB

from .options import VersionedSource

#: Creates the source behind a URL. The dict is the validator of the version, if it is known.
Make = Callable[[str, dict[str, Any] | None], VersionedSource]
_FAILURES = (SourceUnavailable, SourceNotFound, SourceDenied, SourceChanged)
_CHECK_MIRROR = "Check the mirror, and the announced size"


@dataclass(frozen=True)
class MirrorVersion:
    """Mirror that delivered the first bytes, and its version. A draft manifest stores it as JSON."""

    #: Fingerprint of the URL.
    place: str
    validator: dict[str, Any]


@dataclass(frozen=True)
class Offer:
    """URLs of one object, and what is known before its first byte."""

    #: The best URL first.
    urls: tuple[str, ...]
    #: Checksums that came with the URLs.
    digests: tuple[Digest, ...] = ()
    size: int | None = None
    #: Whether a checksum is compared at the end. Without a checksum, bytes of two mirrors are never combined.
    verified: bool = False
    #: A mirror with fewer bytes per second is slow. The rate is judged after *judge_s* seconds of waiting.
    slow: float = 1.0 * MiB
    judge_s: float = 10.0


#: Gets the first chunk and the rest. If they are a metalink, it returns the offer in it.
Unfold = Callable[[bytes, Iterator[bytes]], Offer | None]


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
