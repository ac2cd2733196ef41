"""The last step of every job that makes an artifact: write small objects, then the manifest, on each store."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, discard, read_manifest, write_manifest
from ssvm_worker.errors import Cancelled, WorkerError
from ssvm_worker.streaming.fan_out import StreamResult
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import put_bytes

from .attempt import Attempt
from .usage import record_usage


def add_small_objects(manifest: Manifest, small: Mapping[str, bytes], role: str) -> Manifest:
    """Return the manifest with entries for the small objects."""
    for name, data in small.items():
        manifest = manifest.with_entry(Entry(name, len(data), str(digest_of(data)), role))
    return manifest


def publish(
    attempt: Attempt, stores: Mapping[str, Store], stored: StreamResult, manifest: Manifest, small: Mapping[str, bytes]
) -> dict[str, Any]:
    """Write the *small* objects and the manifest on every store that has the other objects.

    *manifest* must list the small objects; see ``add_small_objects``. An error of the primary store is raised.
    Returns ``{"stores": […], "owed": {store: error}}`` for the job's result. Each error also names the ``artifact``.
    """
    attempt.progress.start("committing", manifest.size, manifest.size)
    owed = dict(stored.owed)
    for number, (name, store) in enumerate(stores.items()):
        if name in owed:
            continue
        try:
            for key, data in small.items():
                put_bytes(store, manifest.artifact.key(key), data, attempt.owner, attempt.confirm)
            write_manifest(store, manifest, attempt.owner, attempt.confirm)
            record_usage(attempt, store, manifest)
        except WorkerError as error:
            if number == 0 or isinstance(error, Cancelled):
                raise
            owed[name] = error
            with contextlib.suppress(WorkerError):  # clean-up removes the rest
                discard(store, manifest.artifact, attempt.confirm)
    for name, reason in owed.items():
        attempt.log.warning("store %s is owed %s: %s", name, manifest.artifact.prefix, reason)
    return _placement(stores, owed, manifest.artifact)


def find_placement(attempt: Attempt, stores: Mapping[str, Store], artifact: Artifact) -> dict[str, Any]:
    """Return what ``publish`` returns, for an artifact that an earlier job made."""
    owed: dict[str, WorkerError] = {}
    for name, store in stores.items():
        try:
            record_usage(attempt, store, read_manifest(store, artifact))
        except Cancelled:
            raise
        except WorkerError as error:
            owed[name] = error
    return _placement(stores, owed, artifact)


def _placement(stores: Mapping[str, Store], owed: Mapping[str, WorkerError], artifact: Artifact) -> dict[str, Any]:
    return {
        "stores": [name for name in stores if name not in owed],
        "owed": {name: error.as_dict() | {"artifact": artifact.prefix} for name, error in owed.items()},
    }
