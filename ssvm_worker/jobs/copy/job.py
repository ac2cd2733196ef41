"""Copy an artifact from one image store to others, each object verified as it passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field, model_validator

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.manifest import (
    Entry,
    Manifest,
    find_manifest,
    read_draft,
    read_manifest,
    write_draft,
    write_manifest,
)
from ssvm_worker.artifacts.manifest import discard as discard_artifact
from ssvm_worker.errors import CorruptImage, InvalidRequest, ObjectNotFound, StoreFull
from ssvm_worker.grain_store.check import read_pack
from ssvm_worker.grain_store.pack import Pack, read_index
from ssvm_worker.grain_store.reader import packs_of
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup.incremental import sweep_packs
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.jobs.request import ArtifactRequest, Prefix
from ssvm_worker.jobs.usage import record_usage
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.streaming.fan_out import store_stream
from ssvm_worker.streaming.interfaces import CHUNK, Sink, Store
from ssvm_worker.streaming.pipeline import tap

from .whole_store import Migration


class Request(ArtifactRequest):
    """The artifact to copy, or all, from where, and where to."""

    account: str = Field("", description="The account that owns the artifact; absent for all")
    id: str = Field("", description="The artifact's id within its account (and volume); absent for all")
    source: str = Field("primary", description="The store that has it")
    stores: list[str] = Field(min_length=1, description="The stores that shall have it, one after the other")
    move: bool = Field(False, description="Delete it at the source, once every copy was read again and is whole")
    patient: bool = Field(False, description="Go on trying for a week while a store is away, full, or refuses")
    all: bool = Field(False, description="Every artifact of the source that the stores do not have, each as a job")
    prefix: Prefix = Field("", description="With all: below this place only, as snapshots/ACCOUNT")
    parallel: int = Field(4, ge=1, le=64, description="With all: so many at once; to S3, some 42 MiB of memory each")

    @model_validator(mode="after")
    def _elsewhere(self) -> Request:
        if self.source in self.stores:
            raise ValueError(f"the source, {self.source}, is also one of the stores to copy to")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Request:
        if self.all == bool(self.account or self.id) or (not self.all and not (self.account and self.id)):
            raise ValueError("give account and id, or all")
        if self.prefix and not self.all:
            raise ValueError("prefix goes with all")
        return self


def resource(request: Request) -> str:
    """Nobody may write or delete the artifact meanwhile; nor, of a backup, the packs that it shares.

    A job that copies all waits for another such job below the same place; each artifact is held while it is copied.
    """
    return f"copy/{request.source}/{request.prefix}".strip("/") if request.all else request.artifact.resource


def discard(request: Request, attempt: Attempt) -> None:
    """Remove what failed attempts have left at the targets; a copy that is complete stays."""
    if request.all:
        return  # each copy has a job of its own, which does it
    for name in request.stores:
        discard_artifact(attempt.store(name), request.artifact, attempt.confirm)
        if request.kind == "backup":
            sweep_packs(attempt.store(name), request.artifact, attempt)


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Make the artifact exist on each store in turn; a store that has it already is left alone.

    Raises InvalidRequest when a store has another artifact there, CorruptImage when the source is damaged.
    """
    if request.all:
        return _all(request, attempt)
    source, targets = attempt.store(request.source), [attempt.store(name) for name in dict.fromkeys(request.stores)]
    try:
        manifest = read_manifest(source, request.artifact)
    except ObjectNotFound:
        if not request.move or not all(find_manifest(each, request.artifact) for each in targets):
            raise
        return _moved(request, attempt, {})  # an earlier attempt got as far as that
    copied = {each.name: _Copying(attempt, source, each, manifest).run() for each in targets}
    return _moved(request, attempt, copied)


def _all(request: Request, attempt: Attempt) -> dict[str, Any]:
    fields = request.model_dump(include={"source", "stores", "move", "patient"})
    return Migration(attempt, fields, request.prefix.strip("/"), request.parallel).run()


def _moved(request: Request, attempt: Attempt, copied: dict[str, Any]) -> dict[str, Any]:
    """The result; of a move, after the source's artifact has gone."""
    if request.move:
        place = request.artifact
        names = {"kind": place.kind, "account": place.account, "id": place.id, "volume": place.volume}
        verify.run(verify.Request(**names, stores=request.stores), attempt)
        delete.run(delete.Request(**names, stores=[request.source]), attempt)
    result = {"prefix": request.artifact.prefix, "source": request.source, "stores": request.stores}
    return result | {"copied": copied, "moved": request.move}


@dataclass
class _Copying:
    """One artifact on its way to one store."""

    attempt: Attempt
    source: Store
    target: Store
    manifest: Manifest
    #: What this attempt has copied, for the result.
    done: dict[str, Any] = field(default_factory=lambda: {"objects": 0, "packs": 0, "bytes": 0, "reused": False})

    def run(self) -> dict[str, Any]:
        there = find_manifest(self.target, self.manifest.artifact)
        if there is not None:
            self._refuse_other(there)
            record_usage(self.attempt, self.target, there)
            return self.done | {"reused": True}
        draft = self._usable_draft()
        self.attempt.progress.start(f"copy to {self.target.name}", self.manifest.size)
        for entry in self.manifest.entries:
            draft = self._object(entry, draft)
        # Behind the maps that name them, so that no sweep between two attempts takes them for free.
        for pack in packs_of(self.source, self.manifest).values():
            self._pack(pack)
        write_manifest(self.target, self.manifest, self.attempt.owner, self.attempt.confirm)
        record_usage(self.attempt, self.target, self.manifest)
        return self.done

    def _refuse_other(self, there: Manifest) -> None:
        if there.entries != self.manifest.entries:
            where = f"{self.target.name}:{self.manifest.artifact.prefix}"
            raise InvalidRequest("There is another artifact in its place", where, "Delete it there first")

    def _usable_draft(self) -> Manifest:
        """What an earlier attempt has copied of this very artifact; whatever else lies there is a dead attempt's."""
        artifact, empty = self.manifest.artifact, replace(self.manifest, entries=())
        draft = read_draft(self.target, artifact)
        if draft is not None and replace(draft, entries=()) == empty:
            self.target.sweep(0, artifact.prefix, spare=self.attempt.job_id)
            return draft
        discard_artifact(self.target, artifact, self.attempt.confirm)
        write_draft(self.target, empty, self.attempt.owner, self.attempt.confirm)
        return empty

    def _object(self, entry: Entry, draft: Manifest) -> Manifest:
        """Copy it unless it is there; the draft that tells so."""
        key = self.manifest.artifact.key(entry.name)
        if draft.entry(entry.name) == entry and self._size_there(key) == entry.size:
            self.attempt.progress.advance(entry.size)
            return draft
        self._stream(entry, key)
        self._count("objects", entry.size)
        draft = draft.with_entry(entry)
        write_draft(self.target, draft, self.attempt.owner, self.attempt.confirm)
        return draft

    def _size_there(self, key: str) -> int | None:
        try:
            return self.target.stat(key).size
        except ObjectNotFound:
            return None

    def _stream(self, entry: Entry, key: str, resume: bool = True) -> None:
        """Copy the bytes, behind those that an earlier attempt has left, and compare them before they are committed."""
        sink = self.target.writer(key, entry.size, owner=self.attempt.owner, resume=resume, copy_from=self.source)
        offset, before = sink.offset, self.attempt.progress.bytes
        with sink:
            chunks = itertools.chain(sink.resumed(), self.attempt.resuming(self.source.reader(key), offset))
            try:
                self._pass(entry, sink, tap(chunks, self.attempt.progress.observe))
                return
            except CorruptImage:
                # What was left may be what is damaged, so a copy made of two pieces gets one clean start.
                if not offset:
                    raise
        self.attempt.log.warning("%s: what an earlier attempt has left is thrown away", key)
        self.attempt.progress.advance(before - self.attempt.progress.bytes)
        self._stream(entry, key, resume=False)

    def _pass(self, entry: Entry, sink: Sink, chunks: Iterable[bytes]) -> None:
        hasher = Hasher()

        def compare() -> None:
            found = (hasher.size, str(hasher.digest()))
            if found != (entry.size, entry.digest):
                what = f"The object has {found[0]} bytes and {found[1]}, not {entry.size} and {entry.digest}"
                where = f"{self.source.name}:{sink.key}"
                raise CorruptImage(what, where, "Restore it from another store, or delete it and store it again")
            self.attempt.confirm()

        store_stream(chunks, {"target": sink}, [hasher], verify=compare, check=self.attempt.check, keep=self._keep)

    def _keep(self, error: BaseException) -> bool:
        """A part on a store that is full stands in everybody's way until there is room, so it goes."""
        return self.attempt.will_resume(error) and not isinstance(error, StoreFull)

    def _pack(self, pack: Pack) -> None:
        """Bring a pack along, unless it is there for another backup of the volume."""
        family = self.manifest.artifact.family
        self.attempt.check()
        if self._has(pack, family):
            return
        data = read_pack(self.source, family, pack, self.attempt.wait)
        with self.target.writer(pack.key(family), pack.size, owner=self.attempt.owner) as sink:
            for at in range(0, len(data), CHUNK):
                self.attempt.check()
                sink.write(data[at : at + CHUNK])
            self.attempt.confirm()
            sink.commit()
        self._count("packs", pack.size)

    def _has(self, pack: Pack, family: str) -> bool:
        """By its index, which holds the digests of all that is in it; ``verify`` reads the rest."""
        if self._size_there(pack.key(family)) != pack.size:
            return False
        try:
            read_index(self.target, family, pack)
        except CorruptImage:
            return False
        return True

    def _count(self, what: str, size: int) -> None:
        self.done[what] += 1
        self.done["bytes"] += size
