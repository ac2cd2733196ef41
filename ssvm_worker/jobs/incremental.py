"""Incremental backups: what jobs do with the grain store."""

from __future__ import annotations

from typing import Any

from ssvm_worker.errors import CorruptImage
from ssvm_worker.grains.check import Damage, damages, hit
from ssvm_worker.grains.sweep import sweep
from ssvm_worker.keys import Artifact
from ssvm_worker.manifest import Manifest
from ssvm_worker.stream import Store

from .attempt import Attempt


def sweep_packs(store: Store, artifact: Artifact, attempt: Attempt) -> dict[str, Any]:
    """Delete the packs of the volume that no backup needs any more; how many, or why none can be known to be free."""
    try:
        swept = sweep(store, artifact.family, attempt.confirm)
    except CorruptImage as error:
        attempt.log.warning("packs that may be free are kept: %s", error)
        return {"deleted": 0, "bytes": 0, "kept": error.as_dict()}
    return {"deleted": swept.packs, "bytes": swept.size}


def verify_packs(store: Store, manifest: Manifest, attempt: Attempt) -> list[str]:
    """Read every pack that a backup needs, and name what is damaged, and the backups and LBAs that it hits."""

    def see(data: bytes) -> None:
        attempt.check()
        attempt.progress.saw(data)

    try:
        found: list[Damage] = list(damages(store, manifest, see, attempt.wait))
    except CorruptImage as error:
        return [str(error)]
    return [f"{store.name}:{each}" for each in (*found, *hit(store, manifest.artifact.family, found))] if found else []
