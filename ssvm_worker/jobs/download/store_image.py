"""Store one image: as it is, decompressed, or converted. Also resume an image that an earlier attempt began."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_draft
from ssvm_worker.formats import ImageInfo, Inspection, guess_format
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.store_set import StoreSet
from ssvm_worker.streaming.fan_out import StreamResult, store_stream
from ssvm_worker.streaming.interfaces import CHUNK, Observer, Sink, Store
from ssvm_worker.streaming.pipeline import limit, tap
from ssvm_worker.unpacking import peek

from .convert import Conversion, converting
from .origin_file import OriginFile
from .resume_note import ResumeNote
from .unwrap import Unpacked

#: The draft's fact that says how many bytes are durable.
_DURABLE = "settled"


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
        inspection = Inspection(self.format, self.attempt.limits.max_virtual_size, self.location)
        images: list[ImageInfo] = []

        def verify() -> None:
            self.verify()
            images.append(inspection.finish())
            self.attempt.confirm()

        observers: list[Observer] = [self.hasher, inspection]
        if self.counted:
            observers.append(self.attempt.held.took)
        check, min_rate = self.attempt.check, self.attempt.limits.min_store_rate
        stored = store_stream(chunks, sinks, observers, verify=verify, check=check, keep=self.keep, min_rate=min_rate)
        return images[0], stored

    def entry(self, name: str, image: ImageInfo, role: str = "image") -> Entry:
        """Return the image's entry in the manifest."""
        facts = {"format": image.format, "virtual_size": image.virtual_size, **image.details}
        return Entry(name, self.hasher.size, str(self.hasher.digest()), role, facts)


@dataclass(frozen=True)
class _Opened:
    """An image with open sinks."""

    #: The name of the object.
    name: str
    #: The image from its first byte, including bytes that are stored already.
    image: Unpacked
    sinks: dict[str, Sink]
    #: If set, the sink is the scratch file of this conversion.
    conversion: Conversion | None = None
    #: The draft from which another attempt can resume, or None.
    draft: Manifest | None = None


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
        head, chunks = peek(unpacked.chunks, CHUNK)
        image = dataclasses.replace(unpacked, chunks=chunks)
        size = None if image.wrapping else self._origin.size
        with ExitStack() as stack:
            if to := self._request.convert_to:
                conversion = stack.enter_context(converting(to, self._attempt, self._location))
                sinks = {"scratch": stack.enter_context(conversion.sink(size))}
                return self._store(_Opened(f"{self._request.id}.{to}", image, sinks, conversion))
            declared = self._request.format
            name = f"{self._request.id}.{guess_format(head) if declared == 'auto' else declared}"
            sinks = self._open_sinks(stack, name, size)
            # A compressed file cannot be resumed in its middle.
            draft = self._origin.draft(name) if self._store_set.primary.resumable and not image.wrapping else None
            if draft:
                self._write_draft(draft, 0)
            return self._store(_Opened(name, image, sinks, draft=draft))

    def resume(self, draft: Manifest) -> tuple[Manifest, StreamResult]:
        """Store the rest of an image that an earlier attempt began. Read the stored bytes back to hash them."""
        name, durable = draft.facts["name"], durable_bytes(draft)
        with ExitStack() as stack:
            sinks = self._open_sinks(stack, name, draft.facts["size"], durable)
            primary = sinks[self._store_set.primary.name]
            if primary.offset < durable:  # a sweep has removed the part, so the durable bytes are gone
                self._write_draft(draft, primary.offset)
            chunks = self._origin.resume(draft, primary.resumed(), primary.offset)
            return self._store(_Opened(name, Unpacked(chunks), sinks, draft=draft))

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

    def _store(self, opened: _Opened) -> tuple[Manifest, StreamResult]:
        hasher = self._origin.hasher()
        offered = opened.image.offered or hasher
        can_resume = not (opened.image.wrapping or opened.conversion)
        image_pass = ImagePass(
            self._attempt,
            self._request.format,
            self._location,
            hasher,
            verify=partial(self._origin.verify, offered),
            counted=opened.conversion is None,
            keep=lambda error: can_resume and self._attempt.will_resume(error),
        )
        note: AbstractContextManager[object] = nullcontext()
        if opened.draft:
            primary = opened.sinks[self._store_set.primary.name]
            note = ResumeNote(primary, partial(self._write_draft, opened.draft), self._attempt.check)
        with note:
            image, stored = image_pass.store(opened.image.chunks, opened.sinks)
        entry = image_pass.entry(opened.name, image)
        if opened.conversion:
            entry, stored = self._store_converted(opened.conversion, image, entry)
        return self._origin.manifest(opened.image.wrapping, offered, (entry,)), stored

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
