"""Delete the packs of a volume that no backup needs. The algorithm is mark and sweep."""

from __future__ import annotations

from dataclasses import dataclass

from ssvm_worker.artifacts.layout import MANIFEST, PACKS, Artifact
from ssvm_worker.artifacts.manifest import Manifest, read_manifest
from ssvm_worker.errors import CorruptImage, InvalidRequest, ObjectNotFound
from ssvm_worker.streaming.interfaces import Check, Store, StoredObject

from .map import SUFFIX, GrainMap
from .reader import grain_maps


@dataclass(frozen=True)
class GarbageResult:
    """The number and size of the deleted packs."""

    packs: int = 0
    #: Bytes.
    size: int = 0


def sweep(store: Store, family: str, confirm: Check) -> GarbageResult:
    """Delete each pack below *family* that no grain map refers to. Maps of drafts and of failed attempts count, too.

    The caller must hold the lock of the volume. The function calls *confirm* before each deletion; *confirm* raises if
    the lock is lost. The function can be killed and repeated, because it deletes only unreferenced packs.
    Raises CorruptImage if a map is missing or unreadable. Then it deletes nothing, because any pack may be in use.
    """
    free = free_packs(store, family)
    store.sweep(0, f"{family}/{PACKS}")
    for each in free:
        confirm()
        store.delete(each.key)
    return GarbageResult(len(free), sum(each.size for each in free))


def free_packs(store: Store, family: str) -> list[StoredObject]:
    """Return the packs that ``sweep`` would delete. Raise CorruptImage as ``sweep`` does.

    Without the lock of the volume the result is an estimate.
    """
    packs = list(store.list(f"{family}/{PACKS}"))
    used = _used_packs(store, family) if packs else set()
    return [each for each in packs if each.key.rpartition("/")[2] not in used]


def maps_below(store: Store, family: str) -> list[str]:
    """Return the keys of all grain maps of a volume."""
    return _keys_ending(store, family, SUFFIX)


def manifests_below(store: Store, family: str) -> list[Manifest]:
    """Return the manifests of all backups of a volume. Raise CorruptImage if one cannot be read."""
    manifests = []
    for key in _keys_ending(store, family, f"/{MANIFEST}"):
        try:
            manifests.append(read_manifest(store, Artifact.of_prefix(key.rpartition("/")[0])))
        except (ObjectNotFound, InvalidRequest) as error:
            what = f"The manifest cannot be read: {error.what}"
            raise CorruptImage(what, f"{store.name}:{key}", error.remedy) from error
    return manifests


def _used_packs(store: Store, family: str) -> set[str]:
    """Return the ids of the packs that grain maps refer to."""
    maps = set(maps_below(store, family))
    for manifest in manifests_below(store, family):
        for entry in grain_maps(manifest):
            if manifest.artifact.key(entry.name) not in maps:
                raise CorruptImage(
                    "A grain map is missing, so any pack of the volume may be in use",
                    f"{store.name}:{manifest.artifact.key(entry.name)}",
                    "Copy the map from another store, or delete its backup",
                )
    return {pack.id for key in maps for pack in GrainMap(store, key).packs}


def _keys_ending(store: Store, family: str, suffix: str) -> list[str]:
    """Return the keys of a volume's objects with that suffix, without the packs."""
    keys = (each.key for each in store.list(family) if not each.key.startswith(f"{family}/{PACKS}/"))
    return [key for key in keys if key.endswith(suffix)]
