"""Puts a fetched file on the stores: an image as it is, unwrapped or converted, or the members of a package."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_draft
from ssvm_worker.formats import ImageInfo, guess_format
from ssvm_worker.jobs.publish import listing
from ssvm_worker.jobs.store_set import StoreSet
from ssvm_worker.streaming.fan_out import StreamResult
from ssvm_worker.streaming.interfaces import Sink, Store
from ssvm_worker.streaming.pipeline import limit, tap

from .convert import Conversion, converting
from .image_pass import ImagePass
from .origin_file import OriginFile
from .resume_note import ResumeNote
from .store_ova import StoredOva
from .unwrap import Unpacked, first_bytes, refuse_package, unpack

#: What was stored: its manifest, on which stores, and the small objects that are still to be written.
Kept = tuple[Manifest, StreamResult, dict[str, bytes]]
_SETTLED = "settled"


def settled_in(draft: Manifest) -> int:
    """How many bytes of its object were on the primary's disk for good when it was written."""
    return int(draft.facts.get(_SETTLED, 0))


@dataclass(frozen=True)
class _Opened:
    """All that is known when the first byte may be written."""

    #: Of the object.
    name: str
    #: From byte 0 on, whatever is stored already.
    image: Unpacked
    sinks: dict[str, Sink]
    #: Where the sinks are not those of the stores.
    conversion: Conversion | None = None
    #: From which another attempt can go on; None where none can.
    draft: Manifest | None = None


class StoredImage:
    """One file on its way to the stores."""

    def __init__(self, fetch: OriginFile, targets: StoreSet) -> None:
        self._fetch = fetch
        self._targets = targets
        self._request, self._attempt, self._where = fetch.request, fetch.attempt, fetch.where

    def store(self, draft: Manifest | None) -> Kept:
        """Take the file, or the rest of it that the *draft* lacks; the objects are committed, the manifest is not."""
        with ExitStack() as stack:
            if draft:
                self._attempt.held.expect(draft.facts["size"])
                return self._store_image(self._go_on(draft, stack))
            chunks = self._fetch.begin()
            self._attempt.held.expect(self._fetch.size)
            offered = self._fetch.hasher()
            image = unpack(chunks, offered, self._fetch.bounds)
            if image.members:
                return self._store_package(image, offered)
            return self._store_image(self._begin(image, stack))

    def _begin(self, image: Unpacked, stack: ExitStack) -> _Opened:
        """Open the sinks: by the image's first bytes its kind is known, and with it the object's name."""
        head, chunks = first_bytes(image.chunks)
        image = dataclasses.replace(image, chunks=chunks)
        size = None if image.wrapping else self._fetch.size
        if to := self._request.convert_to:
            conversion = stack.enter_context(converting(to, self._attempt, self._where))
            sinks = {"scratch": stack.enter_context(conversion.sink(size))}
            return _Opened(f"{self._request.id}.{to}", image, sinks, conversion)
        declared = self._request.format
        name = f"{self._request.id}.{guess_format(head) if declared == 'auto' else declared}"
        sinks = self._sinks(stack, name, size)
        # What was unwrapped cannot be taken up again in its middle.
        draft = self._fetch.draft(name) if self._targets.primary.resumable and not image.wrapping else None
        if draft:
            self._note(draft, 0)
        return _Opened(name, image, sinks, draft=draft)

    def _go_on(self, draft: Manifest, stack: ExitStack) -> _Opened:
        """Read back for the hashes what is stored already, then fetch the rest."""
        name = draft.facts["name"]
        sinks = self._sinks(stack, name, draft.facts["size"], settled_in(draft))
        own = sinks[self._targets.primary.name]
        if own.offset < settled_in(draft):  # somebody has swept the part: what is written now is not what was settled
            self._note(draft, own.offset)
        image = Unpacked(self._fetch.go_on(draft, own.resumed(), own.offset))
        return _Opened(name, image, sinks, draft=draft)

    def _sinks(self, stack: ExitStack, name: str, size: int | None, most: int | None = None) -> dict[str, Sink]:
        """One on every store; a store other than the primary may refuse, and is owed the image then.

        The primary's goes on behind what is left of *most* bytes, unless that is None.
        """
        key, owner, primary = self._request.artifact.key(name), self._attempt.owner, self._targets.primary

        def make(store: Store) -> Sink:
            resume = most is not None and store is primary
            return store.writer(key, size, owner=owner, resume=resume, max_bytes=most)

        return self._targets.open(stack, make)

    def _note(self, draft: Manifest, settled: int) -> None:
        """Keep what another attempt must know to go on, with the bytes that it will find, though this one must stop."""
        draft = dataclasses.replace(draft, facts=draft.facts | {_SETTLED: settled})
        write_draft(self._targets.primary, draft, self._attempt.owner, self._attempt.cleaning().confirm)

    def _journal(self, opened: _Opened) -> AbstractContextManager[object]:
        if opened.draft is None:
            return nullcontext()
        sink = opened.sinks[self._targets.primary.name]
        return ResumeNote(sink, partial(self._note, opened.draft), self._attempt.check)

    def _store_image(self, opened: _Opened) -> Kept:
        hasher = self._fetch.hasher()
        offered = opened.image.offered or hasher
        whole = opened.image.wrapping or opened.conversion  # so that no part of it is of use
        one = ImagePass(
            self._attempt,
            self._request.format,
            self._where,
            hasher,
            verify=partial(self._fetch.verify, offered),
            counted=opened.conversion is None,
            keep=lambda error: not whole and self._attempt.will_resume(error),
        )
        with self._journal(opened):
            image, stored = one.store(opened.image.chunks, opened.sinks)
        entry = one.entry(opened.name, image)
        if opened.conversion:
            entry, stored = self._store_converted(opened.conversion, image, entry)
        return self._manifest(opened.image.wrapping, offered, (entry,)), stored, {}

    def _store_converted(self, conversion: Conversion, info: ImageInfo, was: Entry) -> tuple[Entry, StreamResult]:
        """Stream what the conversion makes to the stores, judged as if somebody had sent it."""
        converted = conversion.run(info)
        one = ImagePass(self._attempt, conversion.to, f"{self._where}, converted", Hasher())
        with ExitStack() as stack:
            chunks = limit(converted.open(), self._fetch.most, self._where)
            sinks = self._sinks(stack, was.name, None)
            self._attempt.progress.start("storing")
            image, stored = one.store(tap(chunks, self._attempt.progress.saw), sinks)
        entry = one.entry(was.name, image)
        origin = {"format": info.format, "size": was.size, "digest": was.digest}
        return dataclasses.replace(entry, facts=entry.facts | {"converted_from": origin}), stored

    def _store_package(self, image: Unpacked, offered: Hasher) -> Kept:
        assert image.members is not None
        refuse_package(self._request.format, self._request.convert_to, self._where)
        package = StoredOva(self._attempt, self._request.artifact, self._targets, self._where)
        disks = package.store(image.members)
        self._fetch.verify(offered)
        small = package.small()
        manifest = self._manifest("ova", offered, (package.descriptor(), *disks))
        return listing(manifest, dict(list(small.items())[1:]), "config"), StreamResult(), small

    def _manifest(self, wrapping: str, offered: Hasher, entries: tuple[Entry, ...]) -> Manifest:
        facts = {"name": self._request.name}
        source = self._fetch.facts(wrapping, offered)
        return Manifest(self._request.artifact, self._attempt.job_id, entries, source, facts)
