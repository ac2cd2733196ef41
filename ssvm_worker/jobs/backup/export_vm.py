"""The export of one snapshot: its disks, some in parallel, and the files that describe them."""

from __future__ import annotations

import dataclasses
import threading
import time
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, discard, read_draft, write_draft
from ssvm_worker.errors import SourceNotFound, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.parallel import in_parallel
from ssvm_worker.jobs.store_set import StoreSet, add_small_objects, publish
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import StreamResult
from ssvm_worker.vmware.hardware import EXPORTED, LEFT_OUT, MISSING, Disk, Hardware, select_disks
from ssvm_worker.vmware.ovf import OvfDisk, OvfFile, checksums

from .export_disk import DiskExport
from .incremental import FULL, INCREMENTAL, ChangeCheck, Grains, disagreement, map_name

if TYPE_CHECKING:
    from ssvm_worker.vmware.session import VM
    from ssvm_worker.vmware.snapshot import Snapshot


class VMExport:
    """One attempt to store a snapshot. It skips disks that an earlier attempt has committed."""

    def __init__(
        self,
        attempt: Attempt,
        artifact: Artifact,
        stores: dict[str, Store],
        vm: VM,
        snapshot: Snapshot,
        *,
        incremental: bool = False,
    ) -> None:
        options = vm.options
        spill = (options.spill_dir, options.spill_bytes) if options.spill_dir and options.spill_bytes else None
        self._attempt = attempt
        self._artifact = artifact
        self._targets = StoreSet(attempt, artifact, stores, spill)
        self._vm = vm
        self._snapshot = snapshot
        self._incremental = incremental
        #: The committed disks. The lock protects it, because threads commit disks in any order.
        self._manifest = Manifest(artifact, attempt.job_id)
        self._lock = threading.Lock()

    def run(
        self, origin: dict[str, Any], wanted: list[str] | None, warnings: list[dict[str, Any]]
    ) -> tuple[Manifest, dict[str, Any]]:
        """Store everything. Return the manifest, which contains the *warnings*, and the result of ``publish``.

        Raises InvalidRequest for an unknown disk or a disk that the snapshot does not contain, and QuotaExceeded.
        Raises SourceNotFound if the lease lists none of the disks.
        Otherwise raises the error of the last lease or of the primary store.
        The failure of one disk does not stop the others: the draft manifest keeps the disks that they commit.
        """
        hardware, config = self._vm.read(self._snapshot)
        disks = select_disks(hardware.disks, wanted)
        self._targets.sweep()
        self._begin(origin, hardware, disks, warnings)
        pending = [(number, disk) for number, disk in enumerate(disks) if not self._has(number, disk)]
        left = {disk.key for _, disk in pending}
        self._attempt.held.add(sum(each.size for each in self._manifest.entries if each.facts.get("disk") not in left))
        total = sum(disk.capacity for disk in disks)
        done = total - sum(disk.capacity for _, disk in pending)
        self._attempt.progress.start(f"exporting {len(pending)} of {len(disks)} disks", total, done)
        grain_store = Grains(self._attempt, self._artifact, self._targets) if self._incremental else nullcontext()
        with grain_store as grains:
            export = DiskExport(self._attempt, self._targets, self._vm, self._snapshot, hardware, grains=grains)
            if pending and not any(each.role == "nvram" and self._targets.has(each) for each in self._manifest.entries):
                self._keep(export.fetch_nvram(f"{self._artifact.id}.nvram"))
            steps = [partial(self._one_disk, export, number, disk) for number, disk in pending]
            in_parallel(self._vm.options.parallel_disks, steps)
        self._vm.revive()
        disks = self._record_missing(disks, export.missing)
        self._add_facts(warnings=warnings + export.power.warnings)
        self._add_facts(remarks=export.remarks + self._check_changes(disks))
        return self._publish(hardware, disks, config)

    def _check_changes(self, disks: list[Disk]) -> list[str]:
        """Record the result of changed block tracking for each disk. Return a remark for each contradiction."""
        if not self._incremental:
            return []
        check = ChangeCheck(self._attempt, self._targets.primary, self._manifest, self._vm, self._snapshot)
        verdicts = {disk.key: {"cbt": check.verdict(disk)} for disk in disks}
        self._add_facts(disks=[each | verdicts.get(each["key"], {}) for each in self._manifest.facts["disks"]])
        remarks = [f"{disk.label}: {text}" for disk in disks if (text := disagreement(verdicts[disk.key]["cbt"]))]
        for each in remarks:
            self._attempt.log.warning("%s", each)
        return remarks

    def _begin(
        self, origin: dict[str, Any], hardware: Hardware, disks: list[Disk], warnings: list[dict[str, Any]]
    ) -> None:
        """Load the draft manifest of an earlier attempt at the same snapshot, or start a new one."""
        mode = INCREMENTAL if self._incremental else FULL
        source = {"request": origin, "vm": self._vm.moref, "mode": mode, "snapshot": dataclasses.asdict(self._snapshot)}
        draft = read_draft(self._targets.primary, self._artifact)
        if draft is None or not _same_origin(draft.source, source):
            self._targets.discard()
            draft = Manifest(self._artifact, self._attempt.job_id, source=source)
        self._manifest = draft
        self._add_facts(
            vm_name=hardware.name,
            virtual_size=sum(disk.capacity for disk in disks),
            complete=len(disks) == len(hardware.disks),
            disks=[_described(disk, disks) for disk in hardware.disks],
            warnings=warnings,
        )

    def _record_missing(self, disks: list[Disk], reasons: dict[int, str]) -> list[Disk]:
        """Return the stored disks, and record the reason for each missing disk in the manifest."""
        stored = [disk for disk in disks if disk.key not in reasons]
        if not stored:
            listed = "; ".join(f"{disk.label} ({disk.place}): {reasons[disk.key]}" for disk in disks)
            raise SourceNotFound(f"No disk could be exported. {listed}", self._vm.moref, "Check the host's events")
        described = self._manifest.facts["disks"]
        missing = {key: {"status": MISSING, "why": why} for key, why in reasons.items()}
        complete = self._manifest.facts["complete"] and not reasons
        self._add_facts(
            disks=[each | missing.get(each["key"], {}) for each in described],
            complete=complete,
            virtual_size=sum(disk.capacity for disk in stored),
        )
        return stored

    def _add_facts(self, **facts: Any) -> None:
        self._manifest = dataclasses.replace(self._manifest, facts=self._manifest.facts | facts)

    def _name(self, number: int) -> str:
        return f"{self._artifact.id}-disk{number}.vmdk"

    def _has(self, number: int, disk: Disk) -> bool:
        """Return whether an earlier attempt has stored a disk."""
        name = self._name(number)
        entry = self._manifest.entry(map_name(name) if self._incremental else name)
        return entry is not None and entry.facts["disk"] == disk.key and self._targets.has(entry)

    def _one_disk(self, export: DiskExport, number: int, disk: Disk) -> None:
        self._keep(export.fetch(self._name(number), disk))

    def _keep(self, entries: list[Entry]) -> None:
        """Record committed entries in the draft manifest."""
        with self._lock:
            for entry in entries:
                self._manifest = self._manifest.with_entry(entry)
            write_draft(self._targets.primary, self._manifest, self._attempt.owner, self._attempt.confirm)

    def _publish(self, hardware: Hardware, disks: list[Disk], config: bytes) -> tuple[Manifest, dict[str, Any]]:
        id_ = self._artifact.id
        entries = self._in_order(disks)
        parts = [_ovf_disk(entry, disk) for entry, disk in zip(entries, disks, strict=False)]
        others = [OvfFile(each.name, each.size, each.facts["lease_key"]) for each in entries[len(disks) :]]
        descriptor, reason = self._vm.descriptor(self._snapshot, hardware, parts, others)
        if reason:
            self._attempt.log.info("the worker writes its own OVF descriptor: %s", reason)
        self._add_facts(
            snapshot_age_s=round(max(0.0, time.time() - self._snapshot.created)),
            descriptor=f"our own: {reason}" if reason else "the server's",
            disks=[each | _grade(entries, each["key"]) for each in self._manifest.facts["disks"]],
        )
        digests = [(f"{id_}.ovf", digest_of(descriptor).hex)]
        digests += [(each.name, each.digest.partition(":")[2]) for each in entries]
        manifest = dataclasses.replace(self._manifest, entries=tuple(entries))
        small = {f"{id_}.ovf": descriptor, f"{id_}.mf": checksums(digests), f"{id_}.config.json": config}
        for name, role in zip(small, ("descriptor", "checksums", "config"), strict=True):
            manifest = add_small_objects(manifest, {name: small[name]}, role)
        stored = StreamResult(owed=self._targets.owed)
        kept = publish(self._attempt, self._targets.stores, stored, manifest, small)
        for name in kept["owed"]:
            with suppress(WorkerError):  # an unreachable store keeps them until the copy job runs
                discard(self._targets.stores[name], self._artifact, self._attempt.confirm)
        return manifest, kept

    def _in_order(self, disks: list[Disk]) -> list[Entry]:
        """Return the entries of the disks in their order, then the other entries."""
        keys = [disk.key for disk in disks]
        found = [each for each in self._manifest.entries if each.facts.get("disk") in keys]
        others = [each for each in self._manifest.entries if each not in found]
        return [*sorted(found, key=lambda each: keys.index(each.facts["disk"])), *others]


def _same_origin(draft: dict[str, Any], source: dict[str, Any]) -> bool:
    """Return whether a draft has the same request, mode and snapshot. Otherwise its disks are not reusable."""
    same = all(draft.get(key) == source[key] for key in ("request", "vm", "mode"))
    return same and draft["snapshot"]["moref"] == source["snapshot"]["moref"]


def _described(disk: Disk, chosen: list[Disk]) -> dict[str, Any]:
    status = LEFT_OUT if disk.status == EXPORTED and disk not in chosen else disk.status
    return {
        "key": disk.key,
        "label": disk.label,
        "place": disk.place,
        "capacity": disk.capacity,
        "status": status,
        "change_id": disk.change_id,
    }


def _grade(entries: list[Entry], key: int) -> dict[str, Any]:
    """Return how the disk with that key was verified."""
    entry = next((each for each in entries if each.facts.get("disk") == key), None)
    return {name: entry.facts[name] for name in ("verified", "lease_manifest")} if entry else {}


def _ovf_disk(entry: Entry, disk: Disk) -> OvfDisk:
    stream = entry.facts.get("stream", {"name": entry.name, "size": entry.size})
    return OvfDisk(disk, stream["name"], stream["size"], entry.facts["populated"], entry.facts["lease_key"])
