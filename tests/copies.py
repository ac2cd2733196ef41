"""An artifact in a store, a second store for its copy, and the content of both."""

from __future__ import annotations

from typing import Any

import pytest

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.units import MiB
from tests.contracts.store import put

PLACE = Artifact("template", "2", "7")
OBJECTS = {
    "7.raw": bytes(range(256)) * (12 * 1024),
    "7-more.raw": b"more" * (MiB),
    "template.properties": b"id=7\n",
}


def store_artifact(store: Any, objects: dict[str, bytes] = OBJECTS, place: Artifact = PLACE) -> Any:
    """Store an artifact as a job does, and return the store."""
    manifest = Manifest(place, "job-0")
    for name, data in objects.items():
        put(store, place.key(name), data)
        manifest = manifest.with_entry(Entry(name, len(data), str(digest_of(data))))
    write_manifest(store, manifest, Owner("job-0", 1))
    return store


def content(store: Store) -> dict[str, bytes]:
    """Return all objects of the store."""
    return {each.key: read_bytes(store, each.key) for each in store.list()}


@pytest.fixture
def archive() -> MemoryStore:
    """Return an empty store."""
    return MemoryStore("archive")
