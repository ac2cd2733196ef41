"""Deletes the packs of a volume that none of its backups needs any more: mark and sweep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ssvm_worker.artifacts.layout import MANIFEST, PACKS, Artifact
from ssvm_worker.artifacts.manifest import Manifest, read_manifest
from ssvm_worker.errors import CorruptImage, InvalidRequest, ObjectNotFound
from ssvm_worker.streaming.interfaces import Check, Store, StoredObject

from .map import SUFFIX, GrainMap
from .reader import grain_maps


@dataclass(frozen=True)
class GarbageResult:
    """What a sweep has deleted."""

    packs: int = 0
    #: Bytes.
    size: int = 0


def sweep(store: Store, family: str, confirm: Check) -> GarbageResult:
    """Delete each pack below *family* that no grain map there refers to; maps of drafts and of the dead count too.

    Only under the lock of the volume. *confirm* is called before each deletion, and raises when the lock is lost. Safe
    to kill and to repeat: it only ever deletes what nobody refers to. Raises CorruptImage, and has deleted nothing,
    when a map cannot be read or is missing: what cannot be known to be free stays.
    """
    free = free_packs(store, family)
    store.sweep(0, f"{family}/{PACKS}")
    for each in free:
        confirm()
        store.delete(each.key)
    return GarbageResult(len(free), sum(each.size for each in free))


def free_packs(store: Store, family: str) -> list[StoredObject]:
    """The packs that ``sweep`` would delete; CorruptImage as there. Without the lock of the volume it is a guess."""
    packs = list(store.list(f"{family}/{PACKS}"))
    used = _used(store, family) if packs else set()
    return [each for each in packs if each.key.rpartition("/")[2] not in used]


def maps_below(store: Store, family: str) -> list[str]:
    """The keys of all grain maps of a volume."""
    return [each.key for each in _beside(store, family) if each.key.endswith(SUFFIX)]


def manifests_below(store: Store, family: str) -> list[Manifest]:
    """The manifests of all backups of a volume; CorruptImage for one that cannot be read."""
    keys = [each.key for each in _beside(store, family) if each.key.endswith(f"/{MANIFEST}")]
    return [_manifest_at(store, key) for key in keys]


def _manifest_at(store: Store, key: str) -> Manifest:
    """The manifest at a key, which a backup's place holds; CorruptImage."""
    try:
        return read_manifest(store, Artifact.of_prefix(key.rpartition("/")[0]))
    except (ObjectNotFound, InvalidRequest) as error:
        raise CorruptImage(f"The manifest cannot be read: {error.what}", f"{store.name}:{key}", error.remedy) from error


def _used(store: Store, family: str) -> set[str]:
    """Names of the packs that are referred to."""
    maps = set(maps_below(store, family))
    for manifest in manifests_below(store, family):
        for entry in grain_maps(manifest):
            if manifest.artifact.key(entry.name) not in maps:
                raise CorruptImage(
                    "A grain map is missing, so no pack of the volume can be known to be free",
                    f"{store.name}:{manifest.artifact.key(entry.name)}",
                    "Bring it back from another store, or delete its backup",
                )
    return {pack.id for key in maps for pack in GrainMap(store, key).packs}


def _beside(store: Store, family: str) -> Iterator[StoredObject]:
    return (each for each in store.list(family) if not each.key.startswith(f"{family}/{PACKS}/"))
