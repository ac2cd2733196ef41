"""The file of a download as it is offered: where it comes from, how much of it is taken, and what it must be."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from ssvm_worker.artifacts.checksum_files import find_in_sums
from ssvm_worker.artifacts.checksums import Digest, Hasher, agreed, is_checksum_url, parse_checksum
from ssvm_worker.artifacts.manifest import Manifest, read_draft
from ssvm_worker.errors import InvalidRequest, TooLarge
from ssvm_worker.jobs.attempt import Attempt, RemoteSource
from ssvm_worker.jobs.request import fingerprint, safe_url
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import RAISE_LIMIT, Resuming, limit, tap
from ssvm_worker.units import human_size

from .request import Request
from .unwrap import DownloadBounds, first_bytes


def find_expected(request: Request, attempt: Attempt) -> Digest | None:
    """The checksum that was asked for, fetched if it is a URL."""
    if request.checksum is None:
        return None
    taken = attempt.limits.checksums
    if is_checksum_url(request.checksum):
        sums = attempt.doors.text(request.checksum, check=attempt.check)
        return find_in_sums(sums, unquote(urlsplit(request.url).path), safe_url(request.checksum), taken)
    checksum = parse_checksum(request.checksum)
    if checksum.algorithm not in taken:
        what = f"The settings take no {checksum.algorithm} checksums"
        raise InvalidRequest(what, "checksum", f"Give one of {', '.join(taken)}")
    return checksum


class OriginFile:
    """One way through the file, taken up again where its server lets go."""

    def __init__(self, request: Request, attempt: Attempt, expected: Digest | None) -> None:
        self.request = request
        self.attempt = attempt
        #: What the file must be, by the request or by a metalink; None if nobody says.
        self.expected = expected
        #: How errors name the file.
        self.where = safe_url(request.url)
        #: Bytes of the file that are taken.
        self.most = min(request.max_bytes or attempt.limits.max_bytes, attempt.limits.max_bytes)
        #: Bytes of the file as its server says, known when it has begun.
        self.size: int | None = None
        self._stream: Resuming | None = None

    @property
    def resumptions(self) -> int:
        """How often the stream was taken up again: its bytes came in one piece more."""
        return self._stream.resumptions if self._stream else 0

    @property
    def bounds(self) -> DownloadBounds:
        """What may come out of the file."""
        return DownloadBounds(self.most, self.attempt.limits.max_ratio, self.where)

    def usable_draft(self, primary: Store) -> Manifest | None:
        """The journal of an earlier attempt of the same download, if its *primary* store can go on."""
        if not primary.resumable or self.request.convert_to:
            return None
        draft = read_draft(primary, self.request.artifact)
        same = draft is not None and draft.source.get("fingerprint") == fingerprint(self.request.url)
        return draft if same else None

    def begin(self) -> Iterator[bytes]:
        """The file from its first byte, which has come when this returns; TooLarge if its size is known and is."""
        source = self._source(None)
        self._stream = self.attempt.resuming(source)
        _, chunks = first_bytes(iter(self._stream))
        self.expected = agreed(self.expected, source.digests, self.where)  # of a metalink that no name gave away
        self.size = source.size
        if self.size is not None and self.size > self.most:
            size = f"{human_size(self.size)} ({self.size} bytes)"
            what = f"The file has {size}, more than the {self.most} bytes that are allowed"
            raise TooLarge(what, self.where, RAISE_LIMIT)
        return self._counted(chunks)

    def go_on(self, draft: Manifest, stored: Iterator[bytes], offset: int) -> Iterator[bytes]:
        """The same file from its first byte, of which the first *offset* are *stored* already."""
        source = self._source(draft.source["validator"] if offset else None)
        self._stream = self.attempt.resuming(source, offset)
        self.size = draft.facts["size"]
        return self._counted(itertools.chain(stored, self._stream))

    def draft(self, name: str) -> Manifest | None:
        """The journal that another attempt can go on from; None if the server cannot give this version again."""
        source = self._opened
        if not (source.resumable and source.validator):
            return None
        origin = {"fingerprint": fingerprint(self.request.url), "validator": dataclasses.asdict(source.validator)}
        facts = {"name": name, "size": source.size}
        return Manifest(self.request.artifact, self.attempt.job_id, source=origin, facts=facts)

    def hasher(self) -> Hasher:
        """One that can tell what was expected."""
        return Hasher(*([self.expected.algorithm] if self.expected else []))

    def verify(self, offered: Hasher) -> None:
        """Raise ChecksumMismatch if the file, which *offered* has seen all of, is not what it must be."""
        self.attempt.progress.start("verifying", self.size, offered.size)
        offered.verify(self.expected, self.where)

    def facts(self, wrapping: str, offered: Hasher) -> dict[str, Any]:
        """What the manifest says of the file."""
        digests = list(dict.fromkeys(str(each) for each in (offered.digest(), self.expected) if each))
        source = {"url": self.where, "fingerprint": fingerprint(self.request.url), "digests": digests}
        return source | ({"wrapping": wrapping, "size": offered.size} if wrapping else {})

    def _source(self, validator: dict[str, Any] | None) -> RemoteSource:
        request = self.request
        self._opened = self.attempt.doors.source(
            [request.url, *request.mirrors],
            headers=request.headers,
            credentials=request.credentials,
            checksum=self.expected,
            check=self.attempt.check,
            validator=validator,
        )
        self.expected = agreed(self.expected, self._opened.digests, self.where)
        return self._opened

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Not longer than allowed, not faster than asked, with its progress."""
        self.attempt.progress.start("download", self.size)
        paced = self.attempt.paced(chunks, self.request.max_rate)
        return tap(limit(paced, self.most, self.where), self.attempt.progress.saw)
