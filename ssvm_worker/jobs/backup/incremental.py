"""Incremental backups: the operations of jobs on the grain store."""

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
from ssvm_worker.jobs.usage import record_pack_usage
from ssvm_worker.ledger.slots import Wait
from ssvm_worker.streaming.interfaces import Observer, Sink, Store
from ssvm_worker.vmware.hardware import Disk, same_tracking

if TYPE_CHECKING:
    from ssvm_worker.jobs.store_set import StoreSet
    from ssvm_worker.vmware.session import VM
    from ssvm_worker.vmware.snapshot import Snapshot

#: The modes of a backup.
FULL, INCREMENTAL = "full", "incremental"
_SECTOR = 512


class Grains:
    """The grain store of one backup, a context manager. It stores disks as packs and maps. Threads may share it."""

    def __init__(self, attempt: Attempt, artifact: Artifact, targets: StoreSet) -> None:
        self._attempt = attempt
        self._artifact = artifact
        self._targets = targets
        self._index = Index(attempt.check)

    def __enter__(self) -> Self:
        """Remove incomplete packs of earlier attempts. Safe because this job holds the volume's lock.

        Complete packs of earlier attempts are reused, so they count for the quota from now on.
        Raises QuotaExceeded if they exceed it.
        """
        for store in self._targets.active():
            self._targets.secondary_may_fail(store, partial(store.sweep, 0, f"{self._artifact.family}/{PACKS}"))
        if self._attempt.held.is_limited:
            for store in self._targets.active():
                record_pack_usage(self._attempt, store, self._artifact)
            self._attempt.held.reserve_again()
        return self

    def __exit__(self, *exc: object) -> None:
        self._index.__exit__()

    def start(self, disk: Disk) -> DiskPacker:
        """Return the packer of a disk. It skips grains that all stores of the backup already have for the volume."""
        listings: list[Listing] = []

        def read_listing(store: Store) -> None:
            listings.append(list_packs(store, self._artifact.family))

        for store in self._targets.active():
            self._targets.secondary_may_fail(store, partial(read_listing, store))
        for warning in self._index.sync(self._targets.primary, listings):
            self._attempt.log.warning("%s", warning)
        writer = f"{self._artifact.prefix} {self._attempt.job_id} {disk.key}"
        return DiskPacker(self._index, disk.capacity, disk.label, writer)

    def sink(self, name: str, packing: DiskPacker) -> Callable[[Store], Sink]:
        """Return a factory for the sink of a disk on a store. *name* is the file name that its stream would have."""
        family, key = self._artifact.family, self._artifact.key(map_name(name))

        def make(store: Store) -> GrainSink:
            # Committed packs stay if the stream fails, and the next lease reuses them: they count when they are stored.
            stored = self._attempt.held.add if store is self._targets.primary else lambda _: None
            return GrainSink(store, family, key, packing, self._attempt.owner, stored=stored)

        return make

    def entry(self, packing: DiskPacker, file: Entry) -> Entry:
        """Return the manifest entry of a completely stored disk. *file* is the entry that its stream would have."""
        packing.mark_stored()
        hasher = Hasher()
        for chunk in packing.map_chunks():
            hasher(chunk)
        facts = {
            "stream": {"name": file.name, "size": file.size, "digest": file.digest},
            "verified": "adler32/1",
            "grains": packing.grains,
            "new_grains": sum(each.grains for each in packing.new_packs()),
            "new_bytes": sum(each.size for each in packing.new_packs()),
            "reused_bytes": packing.reused_bytes(),
            "packs": len(packing.packs()),
        }
        return Entry(map_name(file.name), hasher.size, str(hasher.digest()), ROLE, file.facts | facts)


def disagreement(verdict: str) -> str:
    """Return the remark for a verdict of ChangeCheck. It is empty unless the verdict is a disagreement."""
    if not verdict.startswith("disagrees"):
        return ""
    return (
        f"changed block tracking {verdict}, where it reports no change; backups that rely on it may lack data. "
        "Compare these sectors of this and the previous backup before a reset, which affects every backup program"
    )


def map_name(name: str) -> str:
    """Return the file name of a disk's map for the file name that its stream would have."""
    return name.removesuffix(".vmdk") + SUFFIX


def totals(manifest: Manifest) -> dict[str, Any]:
    """Return the mode and, for an incremental backup, the bytes that are new and that are shared."""
    maps = grain_maps(manifest)
    if not maps:
        return {"mode": FULL}
    sums = {name: sum(each.facts[name] for each in maps) for name in ("new_bytes", "reused_bytes")}
    return {"mode": INCREMENTAL, **sums}


def sweep_packs(store: Store, artifact: Artifact, attempt: Attempt) -> dict[str, Any]:
    """Delete the volume's packs that no backup needs, and count the others for the quota.

    Return the number of deleted packs, or the reason why all are kept.
    """
    try:
        swept = sweep(store, artifact.family, attempt.confirm)
        result: dict[str, Any] = {"deleted": swept.packs, "bytes": swept.size}
    except CorruptImage as error:
        attempt.log.warning("unneeded packs are kept: %s", error)
        result = {"deleted": 0, "bytes": 0, "kept": error.as_dict()}
    record_pack_usage(attempt, store, artifact)
    return result


def verify_packs(store: Store, manifest: Manifest, wait: Wait, see: Observer, intact: set[str]) -> list[str]:
    """Read every pack that a backup needs. Return the damages, with the affected backups and LBAs.

    *see* observes the bytes. Packs in *intact* are skipped, and this function adds the packs that it finds intact.
    """
    try:
        found: list[Damage] = list(damages(store, manifest, see, wait, intact))
    except CorruptImage as error:
        return [str(error)]
    affected = affected_backups(store, manifest.artifact.family, found) if found else ()
    return [f"{store.name}:{each}" for each in (*found, *affected)]


class ChangeCheck:
    """The comparison of the changes since the previous backup with the report of changed block tracking."""

    def __init__(self, attempt: Attempt, store: Store, manifest: Manifest, vm: VM, snapshot: Snapshot) -> None:
        self._attempt = attempt
        self._store = store
        self._manifest = manifest
        self._vm = vm
        self._snapshot = snapshot

    def verdict(self, disk: Disk) -> str:
        """Return ``agrees``, ``disagrees at LBA …`` for a change that vSphere did not report, or ``absent: reason``.

        A backup does not depend on this check, so an error is only a reason for ``absent``.
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
        before = self._previous(disk)
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

    def _previous(self, disk: Disk) -> Manifest | None:
        """Return the last backup of the same disk with the same capacity and comparable change ids, or None."""
        found = [
            each
            for each in manifests_below(self._store, self._manifest.artifact.family)
            if each.artifact != self._manifest.artifact
            and each.source.get("vm") == self._vm.moref
            and (entry := _map_of(each, disk))
            and entry.facts["virtual_size"] == disk.capacity
            and same_tracking(entry.facts["change_id"], disk.change_id)
        ]
        return max(found, key=lambda each: each.created, default=None)


def _map_of(manifest: Manifest, disk: Disk) -> Entry | None:
    return next((each for each in grain_maps(manifest) if each.facts.get("disk") == disk.key), None)
