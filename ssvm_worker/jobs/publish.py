"""The end of every job that makes an artifact: small objects, then the manifest, on each store that took the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssvm_worker.errors import Cancelled, WorkerError
from ssvm_worker.manifest import Manifest, add_bytes, write_manifest
from ssvm_worker.stream import Store, Stored

from .attempt import Attempt


def publish(
    attempt: Attempt, stores: Mapping[str, Store], stored: Stored, manifest: Manifest, small: Mapping[str, bytes]
) -> dict[str, Any]:
    """Make the artifact exist on every store that holds its bytes; the primary, the first, must succeed.

    Returns ``{"stores": […], "owed": {store: error}}`` for the job's result.
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
    for name, reason in owed.items():
        attempt.log.warning("store %s is owed %s: %s", name, manifest.artifact.prefix, reason)
    return {
        "stores": [name for name in stores if name not in owed],
        "owed": {name: reason.as_dict() for name, reason in owed.items()},
    }


def _publish_on(attempt: Attempt, store: Store, manifest: Manifest, small: Mapping[str, bytes]) -> None:
    for name, data in small.items():
        role = "properties" if name.endswith(".properties") else "checksums" if name.endswith(".mf") else "descriptor"
        manifest = add_bytes(store, manifest, name, data, role, attempt.owner)
    attempt.confirm()
    write_manifest(store, manifest, attempt.owner)
