"""Reads one artifact again, whole, and tells what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest
from ssvm_worker.errors import NOT_THERE, ObjectNotFound
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup.consistency import Structure, contradictions
from ssvm_worker.jobs.backup.incremental import verify_packs
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import tap
from ssvm_worker.streaming.rate_limit import SharedRateLimit, paced


class ArtifactCheck:
    """What one attempt reads, at *rate* bytes a second at the most."""

    def __init__(self, attempt: Attempt, rate: int | None) -> None:
        self._attempt = attempt
        self._pace = [(SharedRateLimit(), float(rate))] if rate else []
        #: Packs that were found to be sound, of one volume on one store: its other backups share them.
        self._sound: set[str] = set()
        self._volume = ("", "")
        #: Whether all findings could be noted.
        self.recorded = True

    def findings(self, store: Store, manifest: Manifest) -> list[str]:
        """Read all objects, and all packs that they need; what differs from the manifest, or contradicts it."""
        damaged = [finding for entry in manifest.entries for finding in self._differs(store, manifest, entry)]
        found = damaged or contradictions(store, manifest)
        return found + self._packs(store, manifest)

    def note(self, store: Store, artifact: Artifact, findings: Sequence[str]) -> None:
        """Remember what was found; that this cannot be done now does not undo the reading."""
        try:
            self._attempt.verdicts.note(store.name, artifact.prefix, findings, self._attempt.job_id)
        except NOT_THERE as error:
            if self.recorded:
                self._attempt.log.info("what is found is not recorded: %s", error)
            self.recorded = False

    def _packs(self, store: Store, manifest: Manifest) -> list[str]:
        if manifest.artifact.kind != "backup":
            return []
        if self._volume != (volume := (store.name, manifest.artifact.family)):
            self._volume, self._sound = volume, set()
        return verify_packs(store, manifest, self._attempt.wait, self._saw_pack, self._sound)

    def _saw_pack(self, data: bytes) -> None:
        self._attempt.check()
        self._attempt.progress.observe(data)
        for _ in paced([data], self._pace, self._attempt.wait):
            pass

    def _differs(self, store: Store, manifest: Manifest, entry: Entry) -> list[str]:
        key = manifest.artifact.key(entry.name)
        hasher, structure = Hasher(), Structure(manifest, entry)
        chunks = paced(self._attempt.resuming(store.reader(key)), self._pace, self._attempt.wait)
        try:
            for _ in tap(chunks, self._attempt.progress.observe, hasher, structure):
                self._attempt.check()
        except ObjectNotFound:
            return [f"{store.name}:{key} is missing"]
        if hasher.size != entry.size:
            return [f"{store.name}:{key} has {hasher.size} bytes in place of {entry.size}"]
        if str(hasher.digest()) != entry.digest:
            return [f"{store.name}:{key} has {hasher.digest()} in place of {entry.digest}"]
        return [f"{store.name}:{key}: {finding}"] if (finding := structure.finding()) else []
