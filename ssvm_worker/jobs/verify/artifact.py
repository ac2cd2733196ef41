"""Read one artifact again, and report what is wrong with it."""

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
from ssvm_worker.streaming.pipeline import SharedRateLimit, paced, tap


class ArtifactCheck:
    """The verification of artifacts in one attempt, with at most *rate* bytes per second."""

    def __init__(self, attempt: Attempt, rate: int | None) -> None:
        self._attempt = attempt
        self._pace = [(SharedRateLimit(), float(rate))] if rate else []
        #: The intact packs of one volume on one store. The volume's backups share packs, so each is read once.
        self._intact: set[str] = set()
        self._volume = ("", "")
        #: Whether all results were recorded.
        self.recorded = True

    def findings(self, store: Store, manifest: Manifest) -> list[str]:
        """Read all objects, and all packs that they need. Return the differences to the manifest and contradictions."""
        damaged = [finding for entry in manifest.entries for finding in self._verify_object(store, manifest, entry)]
        found = damaged or contradictions(store, manifest)
        if manifest.artifact.kind != "backup":
            return found
        if self._volume != (volume := (store.name, manifest.artifact.family)):
            self._volume, self._intact = volume, set()
        return found + verify_packs(store, manifest, self._attempt.wait, self._observe_pack, self._intact)

    def record(self, store: Store, artifact: Artifact, findings: Sequence[str]) -> None:
        """Record the result. If that fails, log the error; the verification still counts."""
        try:
            self._attempt.services.scrub_results.note(store.name, artifact.prefix, findings, self._attempt.job_id)
        except NOT_THERE as error:
            if self.recorded:
                self._attempt.log.info("the results are not recorded: %s", error)
            self.recorded = False

    def _observe_pack(self, data: bytes) -> None:
        """Count a pack that was read, and wait for the rate limit."""
        self._attempt.check()
        self._attempt.progress.observe(data)
        for _ in paced([data], self._pace, self._attempt.wait):
            pass

    def _verify_object(self, store: Store, manifest: Manifest, entry: Entry) -> list[str]:
        key = manifest.artifact.key(entry.name)
        hasher, structure = Hasher(), Structure(manifest, entry)
        chunks = paced(self._attempt.resuming(store.reader(key)), self._pace, self._attempt.wait)
        try:
            for _ in tap(chunks, self._attempt.progress.observe, hasher, structure):
                self._attempt.check()
        except ObjectNotFound:
            return [f"{store.name}:{key} is missing"]
        if hasher.size != entry.size:
            return [f"{store.name}:{key} has {hasher.size} bytes instead of {entry.size}"]
        if str(hasher.digest()) != entry.digest:
            return [f"{store.name}:{key} has {hasher.digest()} instead of {entry.digest}"]
        return [f"{store.name}:{key}: {finding}"] if (finding := structure.finding()) else []
