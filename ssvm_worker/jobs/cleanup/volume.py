"""Clean-up of one volume's backups on one store: those that no rule keeps, and packs of grains that none needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.grain_store.garbage import free_packs
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup.consistency import lost_disks
from ssvm_worker.jobs.backup.incremental import sweep_packs
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.jobs.usage import record_pack_usage
from ssvm_worker.streaming.interfaces import Store, StoredObject

from .retention import BackupAge, kept


@dataclass
class Volume:
    """What is listed of it."""

    attempt: Attempt
    store: Store
    #: ``snapshots/ACCOUNT/VOLUME``
    family: str
    #: Of complete ones.
    backups: list[Artifact] = field(default_factory=list)
    #: When its youngest pack was written, in seconds since the epoch; 0 if it has none.
    packed: float = 0.0

    def expired(self, damaged: Collection[str]) -> list[tuple[Manifest, str]]:
        """The backups that no rule keeps, each with the reason. *damaged*: places of what is known to be."""
        _, account, volume = self.family.split("/")
        rule = self.attempt.retention.of(account, volume)
        if not rule or len(self.backups) < 2:
            return []
        manifests = [each for each in map(self._manifest, self.backups) if each]
        known = {each.artifact.id: self._judged(each, damaged) for each in manifests}
        stays = kept(rule, list(known.values()))
        newest = max(stays, key=lambda id_: known[id_].created, default="")
        why = f"no rule keeps it ({rule}); of {len(known)} backups {len(stays)} stay, the newest is {newest}"
        return [(each, why) for each in manifests if each.artifact.id not in stays]

    def free(self) -> list[StoredObject]:
        """Packs that no backup of the volume needs; none where that cannot be known."""
        try:
            return free_packs(self.store, self.family) if self.packed else []
        except CorruptImage as error:
            self.attempt.log.warning("packs that may be free are kept: %s", error)
            return []

    def remove(self, expired: list[Manifest], held: Attempt) -> None:
        """Delete backups, and packs that nobody needs then. *held* is an attempt that holds the volume's lock."""
        for each in expired:
            it = each.artifact
            names = {"kind": it.kind, "account": it.account, "id": it.id, "volume": it.volume}
            delete.run(delete.Request(**names, stores=[self.store.name]), held)
        if self.packed:
            some = Artifact.of_prefix(f"{self.family}/any")
            sweep_packs(self.store, some, held)
            record_pack_usage(held, self.store, some)

    def _manifest(self, artifact: Artifact) -> Manifest | None:
        """None of one that cannot be read: what it was nobody knows, so it stays."""
        try:
            return find_manifest(self.store, artifact)
        except CorruptImage as error:
            self.attempt.log.warning("no rule is applied to it: %s", error)
            return None

    def _judged(self, manifest: Manifest, damaged: Collection[str]) -> BackupAge:
        it = manifest.artifact
        (verified,) = self.attempt.verdicts.times(self.store.name, [it.prefix])
        good = it.prefix not in damaged and not lost_disks(manifest)
        return BackupAge(it.id, datetime.fromisoformat(manifest.created).timestamp(), good, verified)
