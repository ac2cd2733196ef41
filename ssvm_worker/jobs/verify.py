"""Read an artifact again: every object is compared with the manifest, and a backup's disks, OVF and .mf judged."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ssvm_worker.digest import Hasher
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.manifest import Entry, Manifest, read_manifest
from ssvm_worker.stream import Store, tap

from .attempt import Attempt
from .backupcheck import Structure, contradictions
from .incremental import verify_packs
from .request import ArtifactRequest


class Request(ArtifactRequest):
    """The artifact to read, and where."""

    stores: list[str] = Field(["primary"], min_length=1)


def resource(request: Request) -> str:  # noqa: ARG001 - every job answers
    """Nothing is written."""
    return ""


def discard(request: Request, attempt: Attempt) -> None:
    """Nothing was written."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Read all of it on every store named; CorruptImage lists what differs or contradicts."""
    found: list[str] = []
    checked = size = 0
    for name in request.stores:
        store = attempt.store(name)
        manifest = read_manifest(store, request.artifact)
        attempt.progress.start(f"verify {name}", manifest.size)
        damaged = [finding for entry in manifest.entries for finding in _differs(store, manifest, entry, attempt)]
        found += damaged or contradictions(store, manifest)
        found += verify_packs(store, manifest, attempt)
        checked, size = checked + len(manifest.entries), size + manifest.size
    if found:
        what = f"{len(found)} of {checked} objects are damaged: {'; '.join(found)}"
        raise CorruptImage(
            what, request.artifact.prefix, "Restore it from another store, or delete it and store it again"
        )
    return {"objects": checked, "bytes": size, "stores": request.stores}


def _differs(store: Store, manifest: Manifest, entry: Entry, attempt: Attempt) -> list[str]:
    key = manifest.artifact.key(entry.name)
    hasher, structure = Hasher(), Structure(manifest, entry)
    try:
        for _ in tap(attempt.resuming(store.reader(key)), attempt.progress.saw, hasher, structure):
            attempt.check()
    except ObjectNotFound:
        return [f"{store.name}:{key} is missing"]
    if hasher.size != entry.size:
        return [f"{store.name}:{key} has {hasher.size} bytes in place of {entry.size}"]
    if str(hasher.digest()) != entry.digest:
        return [f"{store.name}:{key} has {hasher.digest()} in place of {entry.digest}"]
    return [f"{store.name}:{key}: {finding}"] if (finding := structure.finding()) else []
