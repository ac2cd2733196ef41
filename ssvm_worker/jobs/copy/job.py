"""Copy an artifact from one image store to others. Verify each object on the way."""

from __future__ import annotations

import contextlib
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
from ssvm_worker.streaming.interfaces import CHUNK, Sink, Store
from ssvm_worker.streaming.pipeline import store_stream, tap

from .whole_store import Migration


class Request(ArtifactRequest):
    """The artifact to copy, or all artifacts, the source store, and the target stores."""

    account: str = Field("", description="The account that owns the artifact. Absent with all")
    id: str = Field("", description="The artifact's id within its account (and volume). Absent with all")
    source: str = Field("primary", description="The store that has the artifact")
    stores: list[str] = Field(min_length=1, description="The target stores, copied one after the other")
    move: bool = Field(False, description="Delete the artifact at the source after all copies were read and verified")
    patient: bool = Field(False, description="Retry for a week while a store is unreachable, full, or refuses access")
    all: bool = Field(False, description="Copy every artifact that the target stores lack, each as a separate job")
    prefix: Prefix = Field("", description="With all: only artifacts below this prefix, such as snapshots/ACCOUNT")
    parallel: int = Field(
        4, ge=1, le=64, description="With all: copies at the same time. To S3, each needs about 42 MiB of memory"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Request:
        if self.source in self.stores:
            raise ValueError(f"the source, {self.source}, is also one of the stores to copy to")
        if self.all == bool(self.account or self.id) or (not self.all and not (self.account and self.id)):
            raise ValueError("give account and id, or all")
        if self.prefix and not self.all:
            raise ValueError("prefix requires all")
        return self


def resource(request: Request) -> str:
    """Return the artifact's resource: no other job may write or delete the artifact or its packs.

    A job that copies all artifacts excludes another such job of the same source and prefix. Each of its copies also
    locks the artifact.
    """
    return f"copy/{request.source}/{request.prefix}".strip("/") if request.all else request.artifact.resource


def discard(request: Request, attempt: Attempt) -> None:
    """Remove everything that failed attempts left at the targets. Complete copies stay."""
    if request.all:
        return  # the job of each copy does this
    for name in request.stores:
        discard_artifact(attempt.store(name), request.artifact, attempt.confirm)
        if request.kind == "backup":
            sweep_packs(attempt.store(name), request.artifact, attempt)


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Copy the artifact to each target that lacks it, one target after the other.

    Raises InvalidRequest if a target has another artifact of this name. Raises CorruptImage if the source is damaged.
    """
    if request.all:
        fields = request.model_dump(include={"source", "stores", "move", "patient"})
        return Migration(attempt, fields, request.prefix.strip("/"), request.parallel).run()
    source, targets = attempt.store(request.source), [attempt.store(name) for name in dict.fromkeys(request.stores)]
    try:
        manifest = read_manifest(source, request.artifact)
    except ObjectNotFound:
        if not request.move or not all(find_manifest(each, request.artifact) for each in targets):
            raise
        manifest = None  # an earlier attempt has copied the artifact and deleted it at the source
    copied = {each.name: _Copy(attempt, source, each, manifest).run() for each in targets} if manifest else {}
    artifact = request.artifact
    if request.move:
        names = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "volume": artifact.volume}
        verify.run(verify.Request(**names, stores=request.stores), attempt)
        delete.run(delete.Request(**names, stores=[request.source]), attempt)
    result = {"prefix": artifact.prefix, "source": request.source, "stores": request.stores}
    return result | {"copied": copied, "moved": request.move}


@dataclass
class _Copy:
    """The copy of one artifact to one store."""

    attempt: Attempt
    source: Store
    target: Store
    manifest: Manifest
    #: What this attempt has copied, for the result.
    copied: dict[str, Any] = field(default_factory=lambda: {"objects": 0, "packs": 0, "bytes": 0, "reused": False})

    def run(self) -> dict[str, Any]:
        existing = find_manifest(self.target, self.manifest.artifact)
        if existing is not None:
            if existing.entries != self.manifest.entries:
                location = f"{self.target.name}:{self.manifest.artifact.prefix}"
                raise InvalidRequest("There is another artifact in its place", location, "Delete it there first")
            record_usage(self.attempt, self.target, existing)
            return self.copied | {"reused": True}
        draft = self._usable_draft()
        self.attempt.progress.start(f"copy to {self.target.name}", self.manifest.size)
        for entry in self.manifest.entries:
            draft = self._copy_object(entry, draft)
        # The packs follow the maps that name them. Otherwise a sweep between two attempts would remove the packs.
        for pack in packs_of(self.source, self.manifest).values():
            self._copy_pack(pack)
        write_manifest(self.target, self.manifest, self.attempt.owner, self.attempt.confirm)
        record_usage(self.attempt, self.target, self.manifest)
        return self.copied

    def _usable_draft(self) -> Manifest:
        """Return the draft of an earlier attempt to copy this artifact, or write a new draft.

        Everything else below the prefix is a leftover, and is removed.
        """
        artifact, empty = self.manifest.artifact, replace(self.manifest, entries=())
        draft = read_draft(self.target, artifact)
        if draft is not None and replace(draft, entries=()) == empty:
            self.target.sweep(0, artifact.prefix, spare=self.attempt.job_id)
            return draft
        discard_artifact(self.target, artifact, self.attempt.confirm)
        write_draft(self.target, empty, self.attempt.owner, self.attempt.confirm)
        return empty

    def _copy_object(self, entry: Entry, draft: Manifest) -> Manifest:
        """Copy the object if the draft does not list it. Return the draft that lists it."""
        key = self.manifest.artifact.key(entry.name)
        if draft.entry(entry.name) == entry and self._target_size(key) == entry.size:
            self.attempt.progress.skip(entry.size)
            return draft
        self._stream(entry, key)
        self._count("objects", entry.size)
        draft = draft.with_entry(entry)
        write_draft(self.target, draft, self.attempt.owner, self.attempt.confirm)
        return draft

    def _target_size(self, key: str) -> int | None:
        try:
            return self.target.stat(key).size
        except ObjectNotFound:
            return None

    def _stream(self, entry: Entry, key: str, resume: bool = True) -> None:
        """Copy the bytes, and compare the digest before the commit. Resume after the bytes of an earlier attempt."""
        sink = self.target.writer(key, entry.size, owner=self.attempt.owner, resume=resume, copy_from=self.source)
        offset, before = sink.offset, self.attempt.progress.bytes
        with sink:
            chunks = itertools.chain(sink.resumed(), self.attempt.resuming(self.source.reader(key), offset))
            try:
                self._verify_and_commit(entry, sink, tap(chunks, self.attempt.progress.observe))
                return
            except CorruptImage:
                # The bytes of the earlier attempt may be the damaged ones, so the copy starts once more without them.
                if not offset:
                    raise
        self.attempt.log.warning("%s: the bytes of an earlier attempt are discarded", key)
        self.attempt.progress.skip(before - self.attempt.progress.bytes)
        self._stream(entry, key, resume=False)

    def _verify_and_commit(self, entry: Entry, sink: Sink, chunks: Iterable[bytes]) -> None:
        hasher = Hasher()

        def verify() -> None:
            found = (hasher.size, str(hasher.digest()))
            if found != (entry.size, entry.digest):
                what = f"The object has {found[0]} bytes and {found[1]}, not {entry.size} and {entry.digest}"
                location = f"{self.source.name}:{sink.key}"
                raise CorruptImage(what, location, "Restore it from another store, or delete it and store it again")
            self.attempt.confirm()

        def keep(error: BaseException) -> bool:
            # On a full store a part would block other jobs until there is space again.
            return self.attempt.will_resume(error) and not isinstance(error, StoreFull)

        store_stream(chunks, {"target": sink}, [hasher], verify=verify, check=self.attempt.check, keep=keep)

    def _copy_pack(self, pack: Pack) -> None:
        """Copy a pack, unless another backup of the volume has brought it to the target.

        This compares the size and reads the index, which has the digests of all grains. ``verify`` reads the rest.
        """
        family = self.manifest.artifact.family
        self.attempt.check()
        if self._target_size(pack.key(family)) == pack.size:
            with contextlib.suppress(CorruptImage):
                read_index(self.target, family, pack)
                return
        data = read_pack(self.source, family, pack, self.attempt.wait)
        with self.target.writer(pack.key(family), pack.size, owner=self.attempt.owner) as sink:
            for start in range(0, len(data), CHUNK):
                self.attempt.check()
                sink.write(data[start : start + CHUNK])
            self.attempt.confirm()
            sink.commit()
        self._count("packs", pack.size)

    def _count(self, what: str, size: int) -> None:
        self.copied[what] += 1
        self.copied["bytes"] += size
