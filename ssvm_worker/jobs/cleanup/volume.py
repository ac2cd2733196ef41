"""Clean-up of one volume on one store: remove backups past retention, and packs that no backup needs."""

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
from ssvm_worker.streaming.interfaces import Store, StoredObject

from .retention import BackupAge, backups_to_keep


@dataclass
class Volume:
    """The listed backups and packs of a volume."""

    attempt: Attempt
    store: Store
    #: ``snapshots/ACCOUNT/VOLUME``
    family: str
    #: The complete backups.
    backups: list[Artifact] = field(default_factory=list)
    #: When the youngest pack was written, in seconds since the epoch; 0 if there is no pack.
    packed: float = 0.0

    def expired(self, damaged: Collection[str]) -> list[tuple[Manifest, str]]:
        """Return the backups that no rule keeps, with the reason. *damaged* are the prefixes of damaged backups.

        A backup with an unreadable manifest is kept, because its facts are unknown.
        """
        _, account, volume = self.family.split("/")
        rule = self.attempt.settings.retention.of(account, volume)
        if not rule or len(self.backups) < 2:
            return []
        manifests: list[Manifest] = []
        ages: dict[str, BackupAge] = {}
        for artifact in self.backups:
            try:
                manifest = find_manifest(self.store, artifact)
            except CorruptImage as error:
                self.attempt.log.warning("a backup with an unreadable manifest is kept: %s", error)
                continue
            if manifest:
                (verified,) = self.attempt.services.scrub_results.times(self.store.name, [artifact.prefix])
                good = artifact.prefix not in damaged and not lost_disks(manifest)
                created = datetime.fromisoformat(manifest.created).timestamp()
                ages[artifact.id] = BackupAge(artifact.id, created, good, verified)
                manifests.append(manifest)
        kept = backups_to_keep(rule, list(ages.values()))
        newest = max(kept, key=lambda id_: ages[id_].created, default="")
        why = f"no rule keeps it ({rule}); of {len(ages)} backups {len(kept)} stay, the newest is {newest}"
        return [(each, why) for each in manifests if each.artifact.id not in kept]

    def free(self) -> list[StoredObject]:
        """Return the packs that no backup of the volume needs. Return none if a grain map is unreadable."""
        try:
            return free_packs(self.store, self.family) if self.packed else []
        except CorruptImage as error:
            self.attempt.log.warning("packs that may be free are kept: %s", error)
            return []

    def remove(self, expired: list[Manifest], locked: Attempt) -> None:
        """Delete backups, and the packs that no other backup needs. *locked* is an attempt with the volume's lock."""
        for each in expired:
            artifact = each.artifact
            names = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "volume": artifact.volume}
            delete.run(delete.Request(**names, stores=[self.store.name]), locked)
        if self.packed:
            any_backup = Artifact.of_prefix(f"{self.family}/any")
            sweep_packs(self.store, any_backup, locked)
