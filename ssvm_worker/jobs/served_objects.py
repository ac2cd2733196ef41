"""The objects of artifacts that may be handed out: those that a manifest lists, each a file of its own."""

from __future__ import annotations

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, read_manifest
from ssvm_worker.errors import InvalidRequest, ObjectNotFound
from ssvm_worker.grain_store.map import ROLE as GRAIN_MAP
from ssvm_worker.streaming.interfaces import Store


def member(store: Store, key: str) -> Entry:
    """The object as its artifact's manifest lists it; what no manifest lists is not there.

    Raises ObjectNotFound, and InvalidRequest for what is no file of its own.
    """
    prefix, _, name = key.rpartition("/")
    try:
        artifact = Artifact.of_prefix(prefix)
    except InvalidRequest as error:
        raise ObjectNotFound("No object can lie there", key, "`ssvm stat` lists an artifact's objects") from error
    entry = read_manifest(store, artifact).entry(name)
    if entry is None:
        raise ObjectNotFound("The artifact has no such object", f"{store.name}:{key}", "`ssvm stat` lists what it has")
    if entry.role == GRAIN_MAP:
        what = "The disks of an incremental backup lie in packs, and are no files"
        raise InvalidRequest(what, f"{store.name}:{key}", "Restore it to a store first (`ssvm submit restore`)")
    return entry
