"""One object offered in several places: the next place when one fails, is slow or gives something else."""

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

#: Opens the source behind a URL, of the version that a validator tells if one is given.
Make = Callable[[str, dict[str, Any] | None], VersionedSource]
_FAILURES = (SourceUnavailable, SourceNotFound, SourceDenied, SourceChanged)


@dataclass(frozen=True)
class MirrorVersion:
    """Where the first bytes came from, and of which version they are. Goes through JSON in a draft manifest."""

    #: Fingerprint of the URL.
    place: str
    validator: dict[str, Any]


@dataclass(frozen=True)
class Offer:
    """What is known of the object before its first byte."""

    #: The best first.
    urls: tuple[str, ...]
    #: Checksums that came with the URLs.
    digests: tuple[Digest, ...] = ()
    size: int | None = None
    #: Whether a checksum will be compared at the end. Without one, bytes of two places are never put together.
    verified: bool = False
    #: Bytes a second below which another place is tried, and the seconds of waiting after which that is judged.
    slow: float = 1.0 * MiB
    judge_s: float = 10.0


#: Given the first chunk and the rest: what they offer, if they are a document that stands for other URLs.
Unfold = Callable[[bytes, Iterator[bytes]], Offer | None]


class Mirrors:
    """A ``Source`` of the first place that works; the others are asked only when it does not."""

    def __init__(
        self, offer: Offer, make: Make, version: dict[str, Any] | None = None, unfold: Unfold = lambda *_: None
    ) -> None:
        """*version*: ``validator`` as a dict, of an earlier attempt that may be at another place by now."""
        self._make = make
        self._unfold = unfold
        self._take(offer, version)

    def _take(self, offer: Offer, version: dict[str, Any] | None) -> None:
        #: Those that came with the URLs; of a document that stands for others, known when its first chunk has come.
        self.digests = offer.digests
        self._offer = offer
        self._rates: dict[int, float] = {}
        places = [_fingerprint(url) for url in offer.urls]
        known = version if version and version.get("place") in places else None
        self._at = places.index(known["place"]) if known else 0
        self._source = self._make(offer.urls[self._at], known["validator"] if known else None)
        self.name = self._source.name
        self._size: int | None = offer.size
        #: Whether nothing is known yet of the place at hand, though bytes of another may be stored.
        self._is_new = False

    @property
    def size(self) -> int | None:
        """Bytes, the same at every place."""
        return self._size if self._size is not None else self._source.size

    @property
    def resumable(self) -> bool:
        """Whether the place at hand is; or another may go on, because a checksum will tell."""
        return self._source.resumable or (self._offer.verified and len(self._offer.urls) > 1)

    @property
    def validator(self) -> MirrorVersion | None:
        """The place at hand and its version."""
        inner = self._source.validator
        return MirrorVersion(_fingerprint(self._offer.urls[self._at]), dataclasses.asdict(inner)) if inner else None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on. Each place gets one chance; the error is one that may pass, if any may.

        A change of place after the first chunk is a SourceUnavailable: whoever resumes knows of the seam, and goes on
        there. Raises what the places raise; SourceChanged when only another place could go on and no checksum would
        tell.
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
                self._unfold = lambda *_: None  # one document is followed, not a chain of them
                self._take(document.offer, None)
            except _Slow:
                self._move(self._faster(), position)
                raise self._left("Another place may be faster") from None
            except _FAILURES as error:
                if position > offset and self._source.resumable:
                    raise  # it worked until now: whoever resumes comes back to it first
                errors.append(error)
                if error.retryable and not self._may_move(position):
                    raise  # another attempt may succeed, here or from the first byte on
                if len(errors) >= len(self._offer.urls):
                    raise next((each for each in errors if each.retryable), error) from None
                self._move((self._at + 1) % len(self._offer.urls), position)
                if position > offset:
                    raise self._left(error.what) from error

    def _left(self, why: str) -> SourceUnavailable:
        return SourceUnavailable(why, self.name, "Look at the mirrors")

    def _read(self, position: int) -> Generator[bytes, None, None]:
        if position and self._is_new:
            self._look()
        started, waited, read = time.monotonic(), 0.0, 0
        with closing(self._source.open(position)) as chunks:
            for chunk in chunks:
                waited, read = waited + time.monotonic() - started, read + len(chunk)
                if position + read == len(chunk):
                    if offer := self._unfold(chunk, chunks):
                        raise _Unfolded(offer)
                    self._compare_size()
                yield chunk
                if waited >= self._offer.judge_s and self._at not in self._rates:
                    self._judge(read / waited, position + read)
                started = time.monotonic()

    def _look(self) -> None:
        """Learn size and version at a new place from its first chunk."""
        with closing(self._source.open()) as chunks:
            next(chunks, b"")
        self._compare_size()
        if not self._source.resumable or self._source.size is None:
            raise SourceChanged("This place cannot go on in the middle", self._source.name, "Ask again")
        self._is_new = False

    def _compare_size(self) -> None:
        size = self._source.size
        if self._size is not None and size is not None and self._size != size:
            what = f"The file has {size} bytes there, {self._size} were expected"
            raise SourceChanged(what, self._source.name, "Look at the mirror, and at the size that was announced")

    def _compare_end(self, position: int) -> None:
        if self._size is not None and position != self._size:
            what = f"The file ended at {position}, {self._size} bytes were announced"
            raise SourceChanged(what, self._source.name, "Look at the mirror, and at the size that was announced")

    def _judge(self, rate: float, position: int) -> None:
        self._rates[self._at] = rate
        known = position == 0 or self.size is not None
        if rate < self._offer.slow and self._faster() != self._at and known and self._may_move(position):
            raise _Slow

    def _faster(self) -> int:
        """A place that was not tried yet, or else the fastest."""
        places = range(len(self._offer.urls))
        untried = [each for each in places if each not in self._rates]
        return untried[0] if untried else max(places, key=lambda at: self._rates[at])

    def _may_move(self, position: int) -> bool:
        return position == 0 or self._offer.verified

    def _move(self, to: int, position: int) -> None:
        """Go on at another place: only an object of the same length, and only if a checksum will be compared."""
        if not self._may_move(position):
            what = "The place that the first bytes came from is gone, and without a checksum no other can go on"
            raise SourceChanged(what, self._source.name, "Give a checksum; or ask again, to start from the first byte")
        self._size, self._at = self.size, to
        self._source = self._make(self._offer.urls[to], None)
        self._is_new = True


def _fingerprint(url: str) -> str:
    """Tells places apart without giving away what is secret in a URL."""
    return digest_of(url.encode()).hex[:32]


class _Slow(Exception):
    """Another place may be faster."""


class _Unfolded(Exception):
    """What came is no file, but says where it is."""

    def __init__(self, offer: Offer) -> None:
        super().__init__()
        self.offer = offer
