"""The end of every job that makes an artifact: small objects, then the manifest, on each store that took the bytes."""

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
from .usage import count


def listing(manifest: Manifest, small: Mapping[str, bytes], role: str) -> Manifest:
    """The manifest with small objects listed too."""
    for name, data in small.items():
        manifest = manifest.with_entry(Entry(name, len(data), str(digest_of(data)), role))
    return manifest


def publish(
    attempt: Attempt, stores: Mapping[str, Store], stored: StreamResult, manifest: Manifest, small: Mapping[str, bytes]
) -> dict[str, Any]:
    """Make the artifact exist on every store that holds its bytes; the primary, the first, must succeed.

    *manifest* lists the *small* objects already; see ``listing``.
    Returns ``{"stores": […], "owed": {store: error}}`` for the job's result; each error also names the ``artifact``.
    """
    attempt.progress.start("committing", manifest.size, manifest.size)
    owed = dict(stored.owed)
    for number, (name, store) in enumerate(stores.items()):
        if name in owed:
            continue
        try:
            _publish_on(attempt, store, manifest, small)
        except WorkerError as error:
            if number == 0 or isinstance(error, Cancelled):
                raise
            owed[name] = error
            with contextlib.suppress(WorkerError):  # what cannot be removed now is found by clean-up
                discard(store, manifest.artifact, attempt.confirm)
    for name, reason in owed.items():
        attempt.log.warning("store %s is owed %s: %s", name, manifest.artifact.prefix, reason)
    return {
        "stores": [name for name in stores if name not in owed],
        "owed": {name: _owed(reason, manifest.artifact) for name, reason in owed.items()},
    }


def placed(attempt: Attempt, stores: Mapping[str, Store], artifact: Artifact) -> dict[str, Any]:
    """What ``publish`` returned, or would have, for an artifact that an earlier job made."""
    owed: dict[str, Any] = {}
    for name, store in stores.items():
        try:
            count(attempt, store, read_manifest(store, artifact))
        except WorkerError as error:
            owed[name] = _owed(error, artifact)
    return {"stores": [name for name in stores if name not in owed], "owed": owed}


def _owed(reason: WorkerError, artifact: Artifact) -> dict[str, Any]:
    return reason.as_dict() | {"artifact": artifact.prefix}


def _publish_on(attempt: Attempt, store: Store, manifest: Manifest, small: Mapping[str, bytes]) -> None:
    for name, data in small.items():
        put_bytes(store, manifest.artifact.key(name), data, attempt.owner, attempt.confirm)
    write_manifest(store, manifest, attempt.owner, attempt.confirm)
    count(attempt, store, manifest)
