"""Download a template, ISO or volume from a URL to image stores, verified and inspected in one pass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator

from ssvm_worker.digest import Digest, Hasher, agreed, find_in_sums, is_checksum_url, parse_checksum
from ssvm_worker.errors import (
    Cancelled,
    ChecksumMismatch,
    CorruptImage,
    InvalidRequest,
    SourceChanged,
    TooLarge,
    WorkerError,
)
from ssvm_worker.formats import ImageInfo, Inspection, guess_format, parse_format
from ssvm_worker.manifest import Entry, Manifest, find_manifest, read_draft, write_draft
from ssvm_worker.manifest import discard as discard_artifact
from ssvm_worker.stream import RAISE_LIMIT, Resuming, Sink, Store, Stored, limit, store_stream, tap
from ssvm_worker.units import human_size

from .attempt import Attempt, RemoteSource
from .convert import Conversion, converting
from .package import Package
from .properties import properties
from .publish import listing, placed, publish
from .request import ArtifactRequest, fingerprint, safe_url
from .unpack import Bounds, Unpacked, first_bytes, refuse_package, unpack


class Request(ArtifactRequest):
    """An image to fetch."""

    url: str = Field(description="http(s), ftp, sftp, s3, and file or store where allowed; no password in it")
    kind: Literal["template", "iso", "volume"] = "template"
    name: str = Field("", max_length=255, description="What people call it; goes into the properties file")
    format: str = Field("auto", description="auto, or what the image must be: qcow2 vmdk ova vhd vhdx raw iso")
    checksum: str | None = Field(None, description="sha256:HEX, {SHA-256}HEX, a bare digest, or a SHA256SUMS URL")
    stores: list[str] = Field(["primary"], min_length=1, description="The first is the primary and must succeed")
    max_bytes: int | None = Field(None, gt=0, description="Refuse a larger file")
    headers: dict[str, str] = Field(default_factory=dict, description="Sent to the URL's own origin only")
    credentials: str | None = Field(None, description="Name of credentials in the settings")
    convert_to: Literal["qcow2", "raw", "vmdk"] | None = Field(None, description="Store it in this format")
    mirrors: list[str] = Field(default_factory=list, max_length=20, description="Other URLs of the same file")
    max_rate: int | None = Field(None, gt=0, description="Bytes a second at the most")

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        try:
            return parse_format(value)
        except InvalidRequest as error:
            raise ValueError(str(error)) from error

    @field_validator("name")
    @classmethod
    def _no_path(cls, value: str) -> str:
        if not value.isprintable() or set(value) & set("/\\") or value.startswith("."):
            raise ValueError("may not begin with a dot, nor hold slashes or control characters")
        return value

    @field_validator("checksum")
    @classmethod
    def _known_form(cls, value: str | None) -> str | None:
        if value is not None and not is_checksum_url(value):
            try:
                parse_checksum(value)
            except InvalidRequest as error:
                raise ValueError(str(error)) from error
        return value


def resource(request: Request) -> str:
    """Only one job at a time writes an artifact."""
    return request.artifact.prefix


def discard(request: Request, attempt: Attempt) -> None:
    """Remove what failed attempts have left on the stores."""
    for name in request.stores:
        discard_artifact(attempt.store(name), request.artifact)


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Store the image on every store, or on none; the manifest is written last."""
    stores = {name: attempt.store(name) for name in dict.fromkeys(request.stores)}
    expected = _expected(request, attempt)
    if done := _already_there(request, expected, stores):
        return done
    transfer = _Transfer(request, attempt, stores, expected)
    draft = transfer.usable_draft()
    try:
        return transfer.run(draft)
    except (ChecksumMismatch, CorruptImage, SourceChanged) as error:
        # The seam may be what is wrong, so a stream made of several pieces gets one clean start.
        if not transfer.has_seam or (isinstance(error, SourceChanged) and draft is None):
            raise
        attempt.log.warning("starting again from the first byte: %s", error)
    return _Transfer(request, attempt, stores, expected).run(None)


def _expected(request: Request, attempt: Attempt) -> Digest | None:
    """The checksum that was asked for, fetched if it is a URL."""
    if request.checksum is None:
        return None
    if not is_checksum_url(request.checksum):
        return parse_checksum(request.checksum)
    sums = attempt.doors.text(request.checksum, check=attempt.check)
    return find_in_sums(sums, unquote(urlsplit(request.url).path).rsplit("/", 1)[-1], safe_url(request.checksum))


def _already_there(request: Request, expected: Digest | None, stores: dict[str, Store]) -> dict[str, Any] | None:
    """The result of an earlier job if it made just this artifact; InvalidRequest if it made another one."""
    primary = next(iter(stores.values()))
    manifest = find_manifest(primary, request.artifact)
    if manifest is None:
        return None
    as_asked = request.convert_to in (None, manifest.entries[0].facts["format"])
    same_url = manifest.source.get("fingerprint") == fingerprint(request.url)
    if not as_asked or not (str(expected) in manifest.source["digests"] if expected else same_url):
        raise InvalidRequest(
            f"There is another {request.kind} under this id",
            f"{primary.name}:{request.artifact.prefix}",
            "Delete it first (`ssvm delete`), or use a new id",
        )
    return _result(manifest) | placed(stores, request.artifact) | {"resumptions": 0, "reused": True}


def _result(manifest: Manifest) -> dict[str, Any]:
    image = manifest.entries[0]  # of a package its descriptor
    return {
        "key": manifest.artifact.key(image.name),
        "size": sum(each.size for each in manifest.entries if each.role in ("image", "disk")),
        "virtual_size": image.facts["virtual_size"],
        "format": image.facts["format"],
        "digest": image.digest,
        "objects": [each.name for each in manifest.entries],
    }


@dataclass
class _Opened:
    """All that is known when the first byte may be written."""

    #: Of the object; "" for a package, which has several.
    name: str
    #: Bytes of the file as offered.
    size: int | None
    #: From byte 0 on, whatever is stored already.
    image: Unpacked
    sinks: dict[str, Sink]
    #: Where the sinks are not those of the stores.
    conversion: Conversion | None = None


@dataclass
class _Transfer:
    """One pass over the source, from the first byte or from where an earlier attempt stopped."""

    request: Request
    attempt: Attempt
    stores: dict[str, Store]
    expected: Digest | None
    stream: Resuming | None = None
    #: Stores that would not even begin, with their errors.
    refused: dict[str, WorkerError] = field(default_factory=dict)

    @property
    def has_seam(self) -> bool:
        """Whether the bytes came in more than one piece."""
        return self.resumptions > 0

    @property
    def resumptions(self) -> int:
        """How often the stream was taken up again."""
        return self.stream.resumptions if self.stream else 0

    def run(self, draft: Manifest | None) -> dict[str, Any]:
        self.attempt.progress.start("connecting")
        self._sweep(spare=self.attempt.job_id if draft else "")
        with ExitStack() as stack:
            opened = self._go_on(draft, stack) if draft else self._begin(stack)
            manifest, stored, small = self._store_package(opened) if opened.image.members else self._store(opened)
        stored.owed.update(self.refused)
        properly = properties(self.request, manifest)
        manifest = listing(manifest, properly, "properties")
        done = publish(self.attempt, self.stores, stored, manifest, small | properly)
        return _result(manifest) | done | {"resumptions": self.resumptions, "reused": False}

    def usable_draft(self) -> Manifest | None:
        """The journal of an earlier attempt of the same download, if its primary store can go on."""
        if not self._primary.resumable or self.request.convert_to:
            return None
        draft = read_draft(self._primary, self.request.artifact)
        same = draft is not None and draft.source.get("fingerprint") == fingerprint(self.request.url)
        return draft if same else None

    @property
    def _primary(self) -> Store:
        return next(iter(self.stores.values()))

    def _sweep(self, spare: str) -> None:
        """Nobody else may write this artifact now, so what lies there uncommitted is a dead attempt's."""
        for store in self.stores.values():
            try:
                store.sweep(0, self.request.artifact.prefix, spare=spare if store is self._primary else "")
            except WorkerError as error:
                self._primary_must(store, error)

    def _begin(self, stack: ExitStack) -> _Opened:
        """Fetch the first chunk, by which size and kind are known before anything is written."""
        source = self._source(None)
        self.stream = self.attempt.resuming(source)
        head, chunks = first_bytes(iter(self.stream))
        self._refuse_size(source.size)
        bounds = Bounds(self._most, self.attempt.limits.max_ratio, self._where)
        image = unpack(self._counted(chunks, source.size), self._hasher(), bounds)
        declared = self.request.format
        if image.members:
            refuse_package(declared, self.request.convert_to, self._where)
            return _Opened("", source.size, image, {})
        head, chunks = first_bytes(image.chunks)
        image = dataclasses.replace(image, chunks=chunks)
        size = None if image.wrapping else source.size
        if to := self.request.convert_to:
            conversion = stack.enter_context(converting(to, self.attempt, self._where))
            sinks = {"scratch": stack.enter_context(conversion.sink(size))}
            return _Opened(f"{self.request.id}.{to}", source.size, image, sinks, conversion)
        name = f"{self.request.id}.{guess_format(head) if declared == 'auto' else declared}"
        sinks = self._open_sinks(stack, name, size, resume=False)
        if not image.wrapping:  # what was unwrapped cannot be taken up again in its middle
            self._note_draft(source, name)
        return _Opened(name, source.size, image, sinks)

    def _go_on(self, draft: Manifest, stack: ExitStack) -> _Opened:
        """Read back for the hashes what is stored already, then fetch the rest."""
        name, size = draft.facts["name"], draft.facts["size"]
        sinks = self._open_sinks(stack, name, size, resume=True)
        offset = sinks[self._primary.name].offset
        source = self._source(draft.source["validator"] if offset else None)
        self.stream = self.attempt.resuming(source, offset)
        chunks = self._counted(itertools.chain(sinks[self._primary.name].resumed(), self.stream), size)
        return _Opened(name, size, Unpacked(chunks), sinks)

    def _counted(self, chunks: Iterator[bytes], size: int | None) -> Iterator[bytes]:
        """The file as offered, not longer than allowed, with its progress."""
        self.attempt.progress.start("download", size)
        paced = self.attempt.paced(chunks, self.request.max_rate)
        return tap(limit(paced, self._most, self._where), self.attempt.progress.saw)

    def _hasher(self) -> Hasher:
        return Hasher(*([self.expected.algorithm] if self.expected else []))

    @property
    def _where(self) -> str:
        return safe_url(self.request.url)

    def _source(self, validator: dict[str, Any] | None) -> RemoteSource:
        request = self.request
        source = self.attempt.doors.source(
            [request.url, *request.mirrors],
            headers=request.headers,
            credentials=request.credentials,
            checksum=self.expected,
            check=self.attempt.check,
            validator=validator,
        )
        self.expected = agreed(self.expected, source.digests, self._where)
        return source

    def _refuse_size(self, size: int | None) -> None:
        if size is not None and size > self._most:
            what = f"The file has {human_size(size)} ({size} bytes), more than the {self._most} bytes that are allowed"
            raise TooLarge(what, self._where, RAISE_LIMIT)

    @property
    def _most(self) -> int:
        return min(self.request.max_bytes or self.attempt.limits.max_bytes, self.attempt.limits.max_bytes)

    def _open_sinks(self, stack: ExitStack, name: str, size: int | None, resume: bool) -> dict[str, Sink]:
        """One on every store; a store other than the primary may refuse, and is owed the image then."""
        key, owner = self.request.artifact.key(name), self.attempt.owner
        sinks: dict[str, Sink] = {}
        for label, store in self.stores.items():
            try:
                sink = store.writer(key, size, owner=owner, resume=resume and store is self._primary)
                sinks[label] = stack.enter_context(sink)
            except WorkerError as error:
                self._primary_must(store, error)
                self.refused[label] = error
        return sinks

    def _primary_must(self, store: Store, error: WorkerError) -> None:
        if store is self._primary or isinstance(error, Cancelled):
            raise error

    def _note_draft(self, source: RemoteSource, name: str) -> None:
        if self._primary.resumable and source.resumable and source.validator:
            origin = {"fingerprint": fingerprint(self.request.url), "validator": dataclasses.asdict(source.validator)}
            facts = {"name": name, "size": source.size}
            draft = Manifest(self.request.artifact, self.attempt.job_id, source=origin, facts=facts)
            write_draft(self._primary, draft, self.attempt.owner)

    def _store(self, opened: _Opened) -> _Kept:
        hasher = self._hasher()
        offered = opened.image.offered or hasher
        inspection = Inspection(self.request.format, self.attempt.limits.max_virtual_size, self._where)
        images: list[ImageInfo] = []

        def verify() -> None:
            self._verify(offered, opened.size)
            images.append(inspection.finish())
            self.attempt.confirm()

        stored = store_stream(
            opened.image.chunks,
            opened.sinks,
            [hasher, inspection],
            verify=verify,
            check=self.attempt.check,
            keep=lambda error: not (opened.image.wrapping or opened.conversion) and self.attempt.will_resume(error),
        )
        entry = _entry(opened.name, hasher, images[0])
        if opened.conversion:
            entry, stored = self._store_converted(opened.conversion, images[0], entry)
        return self._manifest(opened.image.wrapping, offered, (entry,)), stored, {}

    def _store_converted(self, conversion: Conversion, info: ImageInfo, was: Entry) -> tuple[Entry, Stored]:
        """Stream what the conversion makes to the stores, judged as if somebody had sent it."""
        converted = conversion.run(info)
        hasher, images = Hasher(), list[ImageInfo]()
        inspection = Inspection(conversion.to, self.attempt.limits.max_virtual_size, f"{self._where}, converted")

        def verify() -> None:
            images.append(inspection.finish())
            self.attempt.confirm()

        with ExitStack() as stack:
            chunks = limit(converted.open(), self._most, self._where)
            sinks = self._open_sinks(stack, was.name, None, resume=False)
            self.attempt.progress.start("storing")
            chunks = tap(chunks, self.attempt.progress.saw)
            stored = store_stream(chunks, sinks, [hasher, inspection], verify=verify, check=self.attempt.check)
        entry = _entry(was.name, hasher, images[0])
        origin = {"format": info.format, "size": was.size, "digest": was.digest}
        return dataclasses.replace(entry, facts=entry.facts | {"converted_from": origin}), stored

    def _store_package(self, opened: _Opened) -> _Kept:
        members, offered = opened.image.members, opened.image.offered
        assert members is not None
        assert offered is not None
        package = Package(self.attempt, self.request.artifact, self.stores, self._where)
        disks = package.store(members)
        self._verify(offered, opened.size)
        small = package.small()
        manifest = self._manifest("ova", offered, (package.descriptor(), *disks))
        return listing(manifest, dict(list(small.items())[1:]), "config"), package.stored, small

    def _verify(self, offered: Hasher, size: int | None) -> None:
        self.attempt.progress.start("verifying", size, offered.size)
        offered.verify(self.expected, self._where)

    def _manifest(self, wrapping: str, offered: Hasher, entries: tuple[Entry, ...]) -> Manifest:
        digests = [str(offered.digest())] + ([str(self.expected)] if self.expected else [])
        source = {"url": self._where, "fingerprint": fingerprint(self.request.url), "digests": digests}
        as_offered = {"wrapping": wrapping, "size": offered.size} if wrapping else {}
        names = {"name": self.request.name}
        return Manifest(self.request.artifact, self.attempt.job_id, entries, source | as_offered, names)


def _entry(name: str, hasher: Hasher, image: ImageInfo) -> Entry:
    facts = {"format": image.format, "virtual_size": image.virtual_size, **image.details}
    return Entry(name, hasher.size, str(hasher.digest()), "image", facts)


#: What was stored: its manifest, on which stores, and the small objects that are still to be written.
_Kept = tuple[Manifest, Stored, dict[str, bytes]]
