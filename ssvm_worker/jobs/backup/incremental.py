"""Incremental backups: what jobs do with the grain store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import PACKS, Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest
from ssvm_worker.errors import CorruptImage, WorkerError
from ssvm_worker.grain_store.check import Damage, affected_backups, damages
from ssvm_worker.grain_store.compare import differing, outside
from ssvm_worker.grain_store.garbage import manifests_below, sweep
from ssvm_worker.grain_store.index import Index, Listing, list_packs
from ssvm_worker.grain_store.map import ROLE, SUFFIX
from ssvm_worker.grain_store.reader import grain_maps, open_map
from ssvm_worker.grain_store.sink import GrainSink
from ssvm_worker.grain_store.writer import DiskPacker
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.ledger.slots import Wait
from ssvm_worker.streaming.interfaces import Observer, Sink, Store
from ssvm_worker.vmware.hardware import Disk, comparable

if TYPE_CHECKING:
    from ssvm_worker.jobs.store_set import StoreSet
    from ssvm_worker.vmware.session import VM
    from ssvm_worker.vmware.snapshot import Snapshot

#: The modes of a backup.
FULL, INCREMENTAL = "full", "incremental"
_SECTOR = 512


class Grains:
    """The grain store as one backup uses it: disks go in as packs and maps. Threads may share it; a context manager."""

    def __init__(self, attempt: Attempt, artifact: Artifact, targets: StoreSet) -> None:
        self._attempt = attempt
        self._artifact = artifact
        self._targets = targets
        self._index = Index(attempt.check)

    def __enter__(self) -> Self:
        """Parts of packs that dead attempts have left go; nobody else may write packs of the volume now."""
        for store in self._targets.willing():
            self._targets.only_primary_must(store, partial(store.sweep, 0, f"{self._artifact.family}/{PACKS}"))
        return self

    def __exit__(self, *exc: object) -> None:
        self._index.__exit__()

    def start(self, disk: Disk) -> DiskPacker:
        """The way of a disk into packs; what the volume has on all stores of the backup is not stored again."""
        listings: list[Listing] = []

        def look(store: Store) -> None:
            listings.append(list_packs(store, self._artifact.family))

        for store in self._targets.willing():
            self._targets.only_primary_must(store, partial(look, store))
        for warning in self._index.sync(self._targets.primary, listings):
            self._attempt.log.warning("%s", warning)
        return DiskPacker(self._index, disk.capacity, disk.label)

    def sink(self, name: str, packing: DiskPacker) -> Callable[[Store], Sink]:
        """Makes the sink of a disk on a store; *name* is what its stream would be called."""
        family, key = self._artifact.family, self._artifact.key(map_name(name))
        return lambda store: GrainSink(store, family, key, packing, self._attempt.owner)

    def entry(self, packing: DiskPacker, file: Entry) -> Entry:
        """What the manifest says of a disk, when all is stored; *file* is what it would say of the stream itself."""
        packing.mark_stored()
        hasher = Hasher()
        for chunk in packing.map_chunks():
            hasher(chunk)
        facts = {
            "stream": {"name": file.name, "size": file.size, "digest": file.digest},
            "verified": "adler32/1",
            "grains": packing.grains,
            "new_grains": packing.new_grains,
            "new_bytes": packing.new_bytes,
            "reused_bytes": packing.reused_bytes,
            "packs": len(packing.packs()),
        }
        return Entry(map_name(file.name), hasher.size, str(hasher.digest()), ROLE, file.facts | facts)


def disagreement(verdict: str) -> str:
    """What is to be said of a verdict of ChangeCheck; empty unless it disagrees."""
    if not verdict.startswith("disagrees"):
        return ""
    return f"changed block tracking {verdict}, which it does not name; reset it: its backups would lack that"


def map_name(name: str) -> str:
    """The name of a disk's map, by the name that its stream would have."""
    return name.removesuffix(".vmdk") + SUFFIX


def totals(manifest: Manifest) -> dict[str, Any]:
    """What an incremental backup has stored and what it shares, in bytes; nothing of a full one."""
    maps = grain_maps(manifest)
    if not maps:
        return {"mode": FULL}
    sums = {name: sum(each.facts[name] for each in maps) for name in ("new_bytes", "reused_bytes")}
    return {"mode": INCREMENTAL, **sums}


def sweep_packs(store: Store, artifact: Artifact, attempt: Attempt) -> dict[str, Any]:
    """Delete the packs of the volume that no backup needs any more; how many, or why none can be known to be free."""
    try:
        swept = sweep(store, artifact.family, attempt.confirm)
    except CorruptImage as error:
        attempt.log.warning("packs that may be free are kept: %s", error)
        return {"deleted": 0, "bytes": 0, "kept": error.as_dict()}
    return {"deleted": swept.packs, "bytes": swept.size}


def verify_packs(store: Store, manifest: Manifest, wait: Wait, see: Observer, sound: set[str]) -> list[str]:
    """Read every pack that a backup needs, and name what is damaged, and the backups and LBAs that it hits.

    *see* gets the bytes; packs in *sound* are not read, and those found to be so are added.
    """
    try:
        found: list[Damage] = list(damages(store, manifest, see, wait, sound))
    except CorruptImage as error:
        return [str(error)]
    affected = affected_backups(store, manifest.artifact.family, found) if found else ()
    return [f"{store.name}:{each}" for each in (*found, *affected)]


class ChangeCheck:
    """Compares what changed since the backup before with what changed block tracking says."""

    def __init__(self, attempt: Attempt, store: Store, manifest: Manifest, vm: VM, snapshot: Snapshot) -> None:
        self._attempt = attempt
        self._store = store
        self._manifest = manifest
        self._vm = vm
        self._snapshot = snapshot

    def verdict(self, disk: Disk) -> str:
        """``agrees``; ``disagrees at LBA …`` where grains changed that it does not name; ``absent: why``.

        A backup does not depend on it: whatever goes wrong here is a reason why it is absent.
        """
        try:
            return self._compare(disk)
        except WorkerError as error:
            self._attempt.check()
            return f"absent: {error}"

    def _compare(self, disk: Disk) -> str:
        entry = _map_of(self._manifest, disk)
        if entry is None or not disk.change_id:
            return "absent: changed block tracking is off"
        before = self._before(disk)
        if before is None:
            return "absent: no backup of this disk since tracking began"
        family, old = self._manifest.artifact.family, _map_of(before, disk)
        assert old is not None
        areas = self._vm.changed_areas(self._snapshot, disk, old.facts["change_id"])
        maps = open_map(self._store, self._manifest, entry), open_map(self._store, before, old)
        if maps[0].grain_size != maps[1].grain_size:
            return "absent: the grains have another size"
        wrong = list(outside(differing(self._store, family, *maps), areas))
        if not wrong:
            return "agrees"
        first, length = wrong[0]
        more = f" and {len(wrong) - 1} more places" if len(wrong) > 1 else ""
        return f"disagrees at LBA {first // _SECTOR}-{(first + length) // _SECTOR - 1}{more}"

    def _before(self, disk: Disk) -> Manifest | None:
        """The last backup of the same disk, of the same size and within the same tracking."""
        found = [
            each
            for each in manifests_below(self._store, self._manifest.artifact.family)
            if each.artifact != self._manifest.artifact
            and each.source.get("vm") == self._vm.moref
            and (entry := _map_of(each, disk))
            and entry.facts["virtual_size"] == disk.capacity
            and comparable(entry.facts["change_id"], disk.change_id)
        ]
        return max(found, key=lambda each: each.created, default=None)


def _map_of(manifest: Manifest, disk: Disk) -> Entry | None:
    return next((each for each in grain_maps(manifest) if each.facts.get("disk") == disk.key), None)
