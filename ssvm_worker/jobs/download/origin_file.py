"""The file that the server of a download offers: its source, its size limit, and its expected checksum."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from ssvm_worker.artifacts.checksum_files import find_in_sums
from ssvm_worker.artifacts.checksums import Digest, Hasher, agreed, is_checksum_url, parse_checksum
from ssvm_worker.artifacts.manifest import Entry, Manifest, read_draft
from ssvm_worker.errors import InvalidRequest, TooLarge
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.connections import RemoteSource, SourceRequest
from ssvm_worker.jobs.request import fingerprint, safe_url
from ssvm_worker.streaming.interfaces import CHUNK, Store
from ssvm_worker.streaming.pipeline import RAISE_LIMIT, Resuming, limit, tap
from ssvm_worker.streaming.rate_limit import SharedRateLimit, paced
from ssvm_worker.units import human_size
from ssvm_worker.unpacking import peek

from .request import Request


def find_expected(request: Request, attempt: Attempt) -> Digest | None:
    """Return the requested checksum, fetched if the request names a URL. Raise InvalidRequest if it is disabled."""
    if request.checksum is None:
        return None
    allowed = attempt.limits.checksums
    if is_checksum_url(request.checksum):
        sums = attempt.connections.text(request.checksum, attempt.check)
        return find_in_sums(sums, unquote(urlsplit(request.url).path), safe_url(request.checksum), allowed)
    checksum = parse_checksum(request.checksum)
    if checksum.algorithm not in allowed:
        what = f"{checksum.algorithm} checksums are disabled by download.checksums"
        raise InvalidRequest(what, "checksum", f"Give one of {', '.join(allowed)}")
    return checksum


class OriginFile:
    """One stream of the file, resumed after failures of the server."""

    def __init__(self, request: Request, attempt: Attempt, expected: Digest | None) -> None:
        self.request = request
        self.attempt = attempt
        #: The checksum of the request or of a metalink. None: no checksum is known.
        self.expected = expected
        #: The name of the file in errors.
        self.location = safe_url(request.url)
        #: The largest accepted size of the file in bytes.
        self.max_bytes = min(request.max_bytes or attempt.limits.max_bytes, attempt.limits.max_bytes)
        #: The size in bytes that the server reports. Known after ``open`` or ``resume``.
        self.size: int | None = None
        self._stream: Resuming | None = None

    @property
    def resumptions(self) -> int:
        """Return how often the stream was resumed. Its bytes came in one piece more than that."""
        return self._stream.resumptions if self._stream else 0

    def usable_draft(self, primary: Store) -> Manifest | None:
        """Return the draft manifest of an earlier attempt at this download, if the *primary* store can resume."""
        if not primary.resumable or self.request.convert_to:
            return None
        draft = read_draft(primary, self.request.artifact)
        same = draft is not None and draft.source.get("fingerprint") == fingerprint(self.request.url)
        return draft if same else None

    def open(self) -> Iterator[bytes]:
        """Return the chunks of the file. The first chunk has arrived when this returns.

        Raises TooLarge if the server reports a size above the limit.
        """
        source = self._open_source(None)
        self._stream = self.attempt.resuming(source)
        _, chunks = peek(self._stream, CHUNK)
        # A URL whose name does not look like a metalink shows with the first chunk that it is one.
        self.expected = agreed(self.expected, source.digests, self.location)
        self.size = source.size
        if self.size is not None and self.size > self.max_bytes:
            size = f"{human_size(self.size)} ({self.size} bytes)"
            what = f"The file has {size}, more than the {self.max_bytes} bytes that are allowed"
            raise TooLarge(what, self.location, RAISE_LIMIT)
        return self._limited(chunks)

    def resume(self, draft: Manifest, stored: Iterator[bytes], offset: int) -> Iterator[bytes]:
        """Return the chunks of the same file from its first byte. The first *offset* bytes come from *stored*."""
        source = self._open_source(draft.source["validator"] if offset else None)
        self._stream = self.attempt.resuming(source, offset)
        self.size = draft.facts["size"]
        return self._limited(itertools.chain(stored, self._stream))

    def _open_source(self, validator: dict[str, Any] | None) -> RemoteSource:
        request = self.request
        self._source = self.attempt.connections.source(
            SourceRequest(
                [request.url, *request.mirrors],
                self.attempt.check,
                request.headers,
                request.credentials,
                self.expected,
                validator,
            )
        )
        self.expected = agreed(self.expected, self._source.digests, self.location)
        return self._source

    def _limited(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Limit the rate by the worker's limit and the request's limit. Limit the size, and count the progress."""
        attempt = self.attempt
        attempt.progress.start("download", self.size)
        rates = [(attempt.pace, float(attempt.limits.max_rate))] if attempt.limits.max_rate else []
        rates += [(SharedRateLimit(), float(self.request.max_rate))] if self.request.max_rate else []
        chunks = paced(chunks, rates, attempt.wait)
        chunks = limit(chunks, self.max_bytes, self.location)
        return tap(chunks, attempt.progress.observe)

    def draft(self, name: str) -> Manifest | None:
        """Return the draft manifest for a later attempt. None: the server cannot offer this version again."""
        source = self._source
        if not (source.resumable and source.validator):
            return None
        origin = {"fingerprint": fingerprint(self.request.url), "validator": dataclasses.asdict(source.validator)}
        facts = {"name": name, "size": source.size}
        return Manifest(self.request.artifact, self.attempt.job_id, source=origin, facts=facts)

    def hasher(self) -> Hasher:
        """Return a hasher that also computes the algorithm of the expected checksum."""
        return Hasher(*([self.expected.algorithm] if self.expected else []))

    def verify(self, offered: Hasher) -> None:
        """Raise ChecksumMismatch if the complete file, hashed by *offered*, does not have the expected checksum."""
        self.attempt.progress.start("verifying", self.size, offered.size)
        offered.verify(self.expected, self.location)

    def manifest(self, wrapping: str, offered: Hasher, entries: tuple[Entry, ...]) -> Manifest:
        """Return the manifest of the artifact that was made from the file."""
        digests = list(dict.fromkeys(str(each) for each in (offered.digest(), self.expected) if each))
        source: dict[str, Any] = {
            "url": self.location,
            "fingerprint": fingerprint(self.request.url),
            "digests": digests,
        }
        source |= {"wrapping": wrapping, "size": offered.size} if wrapping else {}
        facts = {"name": self.request.name}
        return Manifest(self.request.artifact, self.attempt.job_id, entries, source, facts)
