"""Move the file of a download: from its source, through decompression, to every store.

- ``OriginFile`` is the file that the server offers. It yields the chunks, and knows the limits and the checksum.
- ``unpack`` removes a compression or a tar archive around the image.
- ``StoredImage`` stores one image: as it is, unpacked or converted. It also resumes an earlier attempt.
- ``ImagePass`` is one pass of an image's bytes to the sinks: hash, inspect, write, verify, commit.
- ``ResumeNote`` records regularly how many bytes are durable, so that a later attempt resumes from there.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from ssvm_worker.artifacts.checksum_files import find_in_sums
from ssvm_worker.artifacts.checksums import Digest, Hasher, agreed, is_checksum_url, parse_checksum
from ssvm_worker.artifacts.manifest import Entry, Manifest, read_draft, write_draft
from ssvm_worker.errors import InvalidRequest, TooLarge, UnknownFormat, WorkerError
from ssvm_worker.formats import ImageInfo, Inspection, guess_format
from ssvm_worker.formats.ova import is_descriptor
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.connections import RemoteSource, SourceRequest
from ssvm_worker.jobs.request import fingerprint, safe_url
from ssvm_worker.jobs.store_set import StoreSet
from ssvm_worker.streaming.interfaces import CHUNK, Check, Observer, Sink, Store
from ssvm_worker.streaming.pipeline import (
    RAISE_LIMIT,
    Resuming,
    SharedRateLimit,
    StreamResult,
    first_bytes,
    limit,
    paced,
    store_stream,
    tap,
)
from ssvm_worker.units import human_size
from ssvm_worker.unpacking import PEEK, recognise, refuse_bomb, refuse_nested, tar, unwrap
from ssvm_worker.unpacking.exact_reader import ExactReader
from ssvm_worker.unpacking.tar import TarMember

from .convert import Conversion, converting
from .request import Request

_log = logging.getLogger("ssvm.download")
#: The draft's fact that says how many bytes are durable.
_DURABLE = "settled"
#: Seconds between two records. The first pauses are short, because most transfers are short. Each pause doubles.
_FIRST_S, _LONGEST_S = 0.5, 10.0
#: Seconds that a thread which hangs in a store gets to end after the transfer has failed.
_JOIN_S = 1.0
#: Seconds between two calls of *check*.
_POLL_S = 0.25


def find_expected(request: Request, attempt: Attempt) -> Digest | None:
    """Return the requested checksum, fetched if the request names a URL. Raise InvalidRequest if it is disabled."""
    if request.checksum is None:
        return None
    allowed = attempt.settings.download.checksums
    if is_checksum_url(request.checksum):
        sums = attempt.services.connections.text(request.checksum, attempt.check)
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
        self._limits = attempt.settings.download
        #: The name of the file in errors.
        self.location = safe_url(request.url)
        #: The largest accepted size of the file in bytes.
        self.max_bytes = min(request.max_bytes or self._limits.max_bytes, self._limits.max_bytes)
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
        _, chunks = first_bytes(self._stream, CHUNK)
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
        self._source = self.attempt.services.connections.source(
            SourceRequest(
                [request.url, *request.mirrors],
                self.attempt.check,
                request.headers,
                request.credentials,
                self.expected,
                validator,
                min(self.attempt.store(name).chunk_size for name in request.stores),
            )
        )
        self.expected = agreed(self.expected, self._source.digests, self.location)
        return self._source

    def _limited(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Limit the rate by the worker's limit and the request's limit. Limit the size, and count the progress."""
        attempt = self.attempt
        attempt.progress.start("download", self.size)
        rates = [(attempt.services.rate_limit, float(self._limits.max_rate))] if self._limits.max_rate else []
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
        facts |= {"unique_name": self.request.unique_name} if self.request.unique_name else {}
        return Manifest(self.request.artifact, self.attempt.job_id, entries, source, facts)


@dataclass(frozen=True)
class Unpacked:
    """The image, or the members of an OVA."""

    #: The chunks of the image. Empty for an OVA.
    chunks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    #: What was around the image: gzip, bzip2, xz, zstandard, zip or tar; "" for nothing.
    wrapping: str = ""
    #: The hasher of the file as the server offers it. None: that file is the image.
    offered: Hasher | None = None
    #: The members of an OVA, the descriptor first. Read each member before the next.
    members: Iterator[TarMember] | None = None


def unpack(chunks: Iterator[bytes], hasher: Hasher, location: str, *, max_bytes: int, max_ratio: int) -> Unpacked:
    """Detect by the first bytes what is around the image, and remove it.

    *hasher* hashes the file as the server offers it. It is not used if there is nothing around the image.
    *max_bytes* and *max_ratio* limit the unpacked bytes. *location* is the name of the file in errors.
    """
    head, chunks = first_bytes(chunks, PEEK)
    wrapping = recognise(head)
    if not wrapping:
        return Unpacked(chunks)
    chunks = tap(chunks, hasher)
    if wrapping != "tar":
        _, inside = unwrap(chunks, location)
        inside = refuse_bomb(inside, lambda: hasher.size, max_ratio, location)
        return Unpacked(limit(inside, max_bytes, location), wrapping, hasher)
    members = tar.members(ExactReader(chunks), location)
    first = next(members, None)
    if first is None:
        raise UnknownFormat("The tar archive is empty", location, "Give the URL of an image")
    if is_descriptor(first.name):
        return Unpacked(wrapping="tar", offered=hasher, members=itertools.chain([first], members))
    head, inside = first_bytes(first.chunks, PEEK)
    refuse_nested("tar", head, location)
    return Unpacked(_only_member(inside, members, location), "tar", hasher)


def _only_member(inside: Iterator[bytes], rest: Iterator[TarMember], location: str) -> Iterator[bytes]:
    """Yield the chunks of the first member. At the end raise UnknownFormat if the archive has another member."""
    yield from inside
    if other := next(rest, None):
        raise UnknownFormat(
            f"The tar archive has several members ({other.name!a} is the second) and is not an OVA",
            location,
            "Pack one image alone, or an OVA with its .ovf as the first member",
        )


def durable_bytes(draft: Manifest) -> int:
    """Return how many bytes of the object were durable on the primary store when the draft was written."""
    return int(draft.facts.get(_DURABLE, 0))


@dataclass(frozen=True)
class ImagePass:
    """One pass of an image: hash it, inspect it and write it to all sinks. Verify it before the first commit."""

    attempt: Attempt
    #: The required format, or auto.
    format: str
    #: The name of the image in errors.
    location: str
    hasher: Hasher
    #: Raises if the complete bytes are not the expected ones.
    verify: Callable[[], None] = lambda: None
    #: Whether the bytes count for the account's quota. Bytes of a scratch file do not.
    counted: bool = True
    #: Returns whether the sinks keep their parts after that error, because another attempt resumes them.
    keep: Callable[[BaseException], bool] = lambda _: False

    def store(self, chunks: Iterator[bytes], sinks: Mapping[str, Sink]) -> tuple[ImageInfo, StreamResult]:
        """Write all *chunks* to all *sinks*. Raises what ``store_stream``, ``verify`` and the inspection raise."""
        inspection = Inspection(self.format, self.attempt.settings.download.max_virtual_size, self.location)
        images: list[ImageInfo] = []

        def verify() -> None:
            self.verify()
            images.append(inspection.finish())
            self.attempt.confirm()

        observers: list[Observer] = [self.hasher, inspection]
        if self.counted:
            observers.append(self.attempt.held.took)
        check, min_rate = self.attempt.check, self.attempt.settings.worker.min_store_rate or 0
        stored = store_stream(chunks, sinks, observers, verify=verify, check=check, keep=self.keep, min_rate=min_rate)
        return images[0], stored

    def entry(self, name: str, image: ImageInfo, role: str = "image") -> Entry:
        """Return the image's entry in the manifest."""
        facts = {"format": image.format, "virtual_size": image.virtual_size, **image.details}
        return Entry(name, self.hasher.size, str(self.hasher.digest()), role, facts)


class StoredImage:
    """The image of a download on its way to the stores."""

    def __init__(self, origin: OriginFile, store_set: StoreSet) -> None:
        self._origin = origin
        self._store_set = store_set
        self._request, self._attempt, self._location = origin.request, origin.attempt, origin.location

    def store(self, unpacked: Unpacked) -> tuple[Manifest, StreamResult]:
        """Store an image from its first byte. Commit the object, but not the manifest.

        The first bytes show the image's format, which determines the object's name.
        """
        head, chunks = first_bytes(unpacked.chunks, CHUNK)
        image = dataclasses.replace(unpacked, chunks=chunks)
        size = None if image.wrapping else self._origin.size
        with ExitStack() as stack:
            if to := self._request.convert_to:
                conversion = stack.enter_context(converting(to, self._attempt, self._location))
                sinks = {"scratch": stack.enter_context(conversion.sink(size))}
                return self._store(f"{self._request.id}.{to}", image, sinks, conversion=conversion)
            declared = self._request.format
            name = f"{self._request.id}.{guess_format(head) if declared == 'auto' else declared}"
            sinks = self._open_sinks(stack, name, size)
            # A compressed file cannot be resumed in its middle.
            draft = self._origin.draft(name) if self._store_set.primary.resumable and not image.wrapping else None
            if draft:
                self._write_draft(draft, 0)
            return self._store(name, image, sinks, draft=draft)

    def resume(self, draft: Manifest) -> tuple[Manifest, StreamResult]:
        """Store the rest of an image that an earlier attempt began. Read the stored bytes back to hash them."""
        name, durable = draft.facts["name"], durable_bytes(draft)
        with ExitStack() as stack:
            sinks = self._open_sinks(stack, name, draft.facts["size"], durable)
            primary = sinks[self._store_set.primary.name]
            if primary.offset < durable:  # a sweep has removed the part, so the durable bytes are gone
                self._write_draft(draft, primary.offset)
            chunks = self._origin.resume(draft, primary.resumed(), primary.offset)
            return self._store(name, Unpacked(chunks), sinks, draft=draft)

    def _open_sinks(self, stack: ExitStack, name: str, size: int | None, durable: int | None = None) -> dict[str, Sink]:
        """Open a sink on every store. A secondary store may fail, and is then owed the image.

        With *durable* the primary's sink keeps at most so many bytes of an earlier attempt.
        """
        key, owner, primary = self._request.artifact.key(name), self._attempt.owner, self._store_set.primary

        def make(store: Store) -> Sink:
            resume = durable is not None and store is primary
            return store.writer(key, size, owner=owner, resume=resume, max_bytes=durable)

        return self._store_set.open_sinks(stack, make)

    def _write_draft(self, draft: Manifest, durable: int) -> None:
        """Write the draft with the number of durable bytes, even if this attempt was cancelled."""
        draft = dataclasses.replace(draft, facts=draft.facts | {_DURABLE: durable})
        write_draft(self._store_set.primary, draft, self._attempt.owner, self._attempt.for_cleanup().confirm)

    def _store(
        self,
        name: str,
        image: Unpacked,
        sinks: dict[str, Sink],
        *,
        conversion: Conversion | None = None,
        draft: Manifest | None = None,
    ) -> tuple[Manifest, StreamResult]:
        """Store the chunks of *image*, which begin with its first byte, as the object *name*.

        With a *conversion* the only sink is its scratch file. With a *draft* another attempt can resume.
        """
        hasher = self._origin.hasher()
        offered = image.offered or hasher
        can_resume = not (image.wrapping or conversion)
        image_pass = ImagePass(
            self._attempt,
            self._request.format,
            self._location,
            hasher,
            verify=partial(self._origin.verify, offered),
            counted=conversion is None,
            keep=lambda error: can_resume and self._attempt.will_resume(error),
        )
        note: AbstractContextManager[object] = nullcontext()
        if draft:
            primary = sinks[self._store_set.primary.name]
            note = ResumeNote(primary, partial(self._write_draft, draft), self._attempt.check)
        with note:
            info, stored = image_pass.store(image.chunks, sinks)
        entry = image_pass.entry(name, info)
        if conversion:
            entry, stored = self._store_converted(conversion, info, entry)
        return self._origin.manifest(image.wrapping, offered, (entry,)), stored

    def _store_converted(
        self, conversion: Conversion, image: ImageInfo, downloaded: Entry
    ) -> tuple[Entry, StreamResult]:
        """Convert the image and store the result in another pass, which inspects it like a download."""
        converted = conversion.run(image)
        image_pass = ImagePass(self._attempt, conversion.to, f"{self._location}, converted", Hasher())
        with ExitStack() as stack:
            chunks = limit(converted.open(), self._origin.max_bytes, self._location)
            sinks = self._open_sinks(stack, downloaded.name, None)
            self._attempt.progress.start("storing")
            result, stored = image_pass.store(tap(chunks, self._attempt.progress.observe), sinks)
        entry = image_pass.entry(downloaded.name, result)
        origin = {"format": image.format, "size": downloaded.size, "digest": downloaded.digest}
        return dataclasses.replace(entry, facts=entry.facts | {"converted_from": origin}), stored


class ResumeNote:
    """Thread that records the durable bytes of one transfer to *sink* while the block runs.

    The bytes that a dead process wrote are in the file. After a crash of the host they may be missing, even if the
    file is long enough. So a later attempt uses only the bytes that were durable when the draft recorded them.

    *record* writes the number of durable bytes to the draft manifest. Leave the block before the draft is deleted. If
    the transfer fails and the sink is suspended, the last record counts all bytes that the sink keeps.
    """

    def __init__(self, sink: Sink, record: Callable[[int], None], check: Check = lambda: None) -> None:
        """Prepare the thread. *check* is called while leaving the block waits for the thread."""
        self._sink = sink
        self._record = record
        self._check = check
        self._recorded = sink.offset
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def __enter__(self) -> ResumeNote:
        self._thread.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self._ended.set()
        if failed:
            self._thread.join(_JOIN_S)
            if not self._thread.is_alive():
                self._sync(last=True)
            return
        while self._thread.is_alive():  # a record that is being written must end before the draft is deleted
            self._thread.join(_POLL_S)
            self._check()

    def _run(self) -> None:
        pause = _FIRST_S
        while not self._ended.wait(pause) and self._sync():
            pause = min(2 * pause, _LONGEST_S)

    def _sync(self, *, last: bool = False) -> bool:
        """Record the durable bytes. Return whether to continue. An error of the store stops the transfer itself."""
        try:
            durable = self._sink.sync()
            if self._ended.is_set() and not last:
                return False
            if durable > self._recorded:
                self._record(durable)
                self._recorded = durable
        except WorkerError as error:
            _log.info("%s: cannot record how many bytes are durable: %s", self._sink.key, error)
            return False
        return True
