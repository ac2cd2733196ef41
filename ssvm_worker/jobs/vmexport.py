"""The disks of one snapshot, each by a lease of its own, and what is stored beside them."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from ssvm_worker.digest import Hasher, digest_of
from ssvm_worker.errors import (
    Cancelled,
    CorruptImage,
    LeaseLost,
    ObjectNotFound,
    ResourceBusy,
    SourceUnavailable,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.formats.streamoptimized import StreamOptimized
from ssvm_worker.keys import Artifact
from ssvm_worker.manifest import Entry, Manifest, discard, read_draft, write_draft
from ssvm_worker.stream import Sink, Store, Stored, store_stream
from ssvm_worker.units import MiB
from ssvm_worker.vmware.hardware import EXPORTED, LEFT_OUT, Disk, Hardware, select_disks
from ssvm_worker.vmware.ovf import OvfDisk, checksums

from .attempt import Attempt
from .publish import listing, publish

if TYPE_CHECKING:
    from ssvm_worker.vmware.lease import Lease, LeaseFile
    from ssvm_worker.vmware.session import VM
    from ssvm_worker.vmware.snapshot import Snapshot

#: What a new lease may put right.
_TRY_AGAIN = (SourceUnavailable, LeaseLost, ResourceBusy)


class VMExport:
    """One attempt at storing a snapshot; what an earlier attempt has committed is not fetched again."""

    def __init__(
        self, attempt: Attempt, artifact: Artifact, stores: dict[str, Store], vm: VM, snapshot: Snapshot
    ) -> None:
        self._attempt = attempt
        self._artifact = artifact
        self._stores = stores
        self._vm = vm
        self._snapshot = snapshot
        self._owed: dict[str, WorkerError] = {}
        #: Bytes of the wanted disks: those that are done, and all.
        self._done = self._total = 0

    def run(
        self, origin: dict[str, Any], wanted: list[str] | None, warnings: list[dict[str, Any]]
    ) -> tuple[Manifest, dict[str, Any]]:
        """Store everything; returns the manifest, which has the *warnings*, and ``publish``'s word on the stores.

        Raises InvalidRequest for a disk that is not there or in no snapshot; else what the last lease or the primary
        store raised.
        """
        hardware, config = self._vm.read(self._snapshot)
        disks = select_disks(hardware.disks, wanted)
        self._total = sum(disk.capacity for disk in disks)
        for store in self._stores.values():
            # Nobody else may write this backup now, so what lies there uncommitted is a dead attempt's.
            self._only_primary_must(store, lambda store=store: store.sweep(0, self._artifact.prefix))
        manifest = self._begin(origin, hardware, disks)
        manifest = dataclasses.replace(manifest, facts=manifest.facts | {"warnings": warnings})
        for number, disk in enumerate(disks):
            manifest = self._one_disk(manifest, f"{self._artifact.id}-disk{number}.vmdk", disk, hardware)
        return self._publish(manifest, hardware, disks, config)

    @property
    def _primary(self) -> Store:
        return next(iter(self._stores.values()))

    def _only_primary_must(self, store: Store, step: Any) -> None:
        """Do a step on a store; another than the primary may fail at it, and is owed the backup then."""
        try:
            step()
        except WorkerError as error:
            if store is self._primary or isinstance(error, Cancelled):
                raise
            self._owed[store.name] = error

    # What is there, and what is wanted.

    def _begin(self, origin: dict[str, Any], hardware: Hardware, disks: list[Disk]) -> Manifest:
        """The journal of an earlier attempt at the same snapshot, or a new one in place of anything else."""
        source = {"request": origin, "vm": self._vm.moref, "snapshot": dataclasses.asdict(self._snapshot)}
        draft = read_draft(self._primary, self._artifact)
        if draft is None or not _same_origin(draft.source, source):
            for store in self._stores.values():
                self._only_primary_must(store, lambda store=store: discard(store, self._artifact))
            draft = Manifest(self._artifact, self._attempt.job_id, source=source)
        facts = {
            "vm_name": hardware.name,
            "virtual_size": self._total,
            "complete": len(disks) == len(hardware.disks),
            "disks": [_described(disk, disks) for disk in hardware.disks],
        }
        return dataclasses.replace(draft, facts=facts)

    def _one_disk(self, manifest: Manifest, name: str, disk: Disk, hardware: Hardware) -> Manifest:
        """The manifest with that disk in it, stored now or by an earlier attempt."""
        entry = manifest.entry(name)
        if entry is not None and entry.facts["disk"] == disk.key and self._is_stored(self._primary, entry):
            self._note_owed(entry)
        else:
            entry = self._fetch(name, disk, hardware)
            manifest = manifest.with_entry(entry)
            write_draft(self._primary, manifest, self._attempt.owner)
        self._done += disk.capacity
        return manifest

    def _is_stored(self, store: Store, entry: Entry) -> bool:
        try:
            return store.stat(self._artifact.key(entry.name)).size == entry.size
        except ObjectNotFound:
            return False

    def _note_owed(self, entry: Entry) -> None:
        """A store that missed a disk of the earlier attempt is owed the backup."""
        for name, store in list(self._stores.items())[1:]:
            try:
                if not self._is_stored(store, entry):
                    raise StoreUnavailable("It missed a disk of an earlier attempt", f"{name}:{entry.name}")
            except WorkerError as error:
                self._owed[name] = error

    # The bytes.

    def _fetch(self, name: str, disk: Disk, hardware: Hardware) -> Entry:
        """Store a disk; a lease that fails is followed by another one, on the same snapshot."""
        left = self._vm.options.lease_tries
        while True:
            try:
                return self._one_lease(name, disk, hardware)
            except _TRY_AGAIN as error:
                left -= 1
                if left <= 0:
                    raise
                self._attempt.log.warning("%s: another lease is tried: %s", disk.label, error)
            self._attempt.wait(self._vm.options.lease_delay_s)

    def _one_lease(self, name: str, disk: Disk, hardware: Hardware) -> Entry:
        self._attempt.progress.start(f"exporting {disk.label}", self._total, self._done)
        with self._vm.export(self._snapshot) as lease:
            file = lease.file_of(disk, hardware.disks)
            try:
                entry = self._stream(name, disk, lease, file)
            except CorruptImage as error:
                # A 200 proves nothing: hosts end a body properly though the disk is not whole.
                raise SourceUnavailable(
                    f"The host did not send the whole disk: {error.what}",
                    f"{disk.label} ({disk.place})",
                    "It is fetched again; if that goes on, look at the host and its datastore",
                ) from error
            lease.complete()
        return entry

    def _stream(self, name: str, disk: Disk, lease: Lease, file: LeaseFile) -> Entry:
        verifier = StreamOptimized(disk.label, disk.capacity, self._vm.options.inflate_every)
        hasher = Hasher()
        advance = _Advance(self._attempt, verifier, lease, self._total)

        def verify() -> None:
            verifier.finish()
            lease.check()
            self._attempt.confirm()

        with ExitStack() as stack:
            sinks = self._open_sinks(stack, name, disk)
            chunks = lease.source(file).open()
            stored = store_stream(chunks, sinks, [hasher, verifier, advance], verify=verify, check=lease.check)
        self._owed |= stored.owed
        for warning in verifier.warnings:
            self._attempt.log.warning("%s: %s", disk.label, warning)
        facts = {
            "format": "vmdk",
            "virtual_size": disk.capacity,
            "disk": disk.key,
            "lease_key": file.key,
            "populated": verifier.data_bytes,
            "verified": "structure"
            if not self._vm.options.inflate_every
            else f"adler32/{self._vm.options.inflate_every}",
            "warnings": verifier.warnings,
        }
        return Entry(name, hasher.size, str(hasher.digest()), "disk", facts)

    def _open_sinks(self, stack: ExitStack, name: str, disk: Disk) -> dict[str, Sink]:
        """A sink on every store that is not owed the backup anyway; the primary's comes first."""
        sinks: dict[str, Sink] = {}

        def add(label: str, store: Store) -> None:
            sink = store.writer(self._artifact.key(name), _hint(store, disk), owner=self._attempt.owner)
            sinks[label] = stack.enter_context(sink)

        for label, store in self._stores.items():
            if label not in self._owed:
                self._only_primary_must(store, lambda label=label, store=store: add(label, store))
        return sinks

    # What lies beside them.

    def _publish(
        self, manifest: Manifest, hardware: Hardware, disks: list[Disk], config: bytes
    ) -> tuple[Manifest, dict[str, Any]]:
        id_ = self._artifact.id
        parts = [_ovf_disk(manifest, disk) for disk in disks]
        descriptor, why = self._vm.descriptor(self._snapshot, hardware, parts)
        if why:
            self._attempt.log.info("the OVF descriptor is our own: %s", why)
        facts = manifest.facts | {"descriptor": f"our own: {why}" if why else "the server's"}
        manifest = dataclasses.replace(manifest, facts=facts)
        digests = [(f"{id_}.ovf", digest_of(descriptor).hex)]
        digests += [(each.name, each.digest.partition(":")[2]) for each in manifest.entries]
        beside = {
            "descriptor": {f"{id_}.ovf": descriptor},
            "checksums": {f"{id_}.mf": checksums(digests)},
            "config": {f"{id_}.config.json": config},
        }
        for role, objects in beside.items():
            manifest = listing(manifest, objects, role)
        small = {name: data for objects in beside.values() for name, data in objects.items()}
        kept = publish(self._attempt, self._stores, Stored(owed=self._owed), manifest, small)
        for name in kept["owed"]:
            with suppress(WorkerError):  # a store that is down keeps them until the copy job comes
                discard(self._stores[name], self._artifact)
        return manifest, kept


class _Advance:
    """Observes chunks behind the verifier, and tells how far the stream has got by its own account."""

    def __init__(self, attempt: Attempt, verifier: StreamOptimized, lease: Lease, total: int) -> None:
        self._attempt = attempt
        self._verifier = verifier
        self._lease = lease
        self._total = total
        self._seen = 0

    def __call__(self, _: bytes) -> None:
        step = self._verifier.lba_bytes - self._seen
        self._seen += step
        progress = self._attempt.progress
        progress.advance(step)
        self._lease.report(100 * progress.bytes // self._total)


def _same_origin(draft: dict[str, Any], source: dict[str, Any]) -> bool:
    """Whether a journal is of the same request and the very same snapshot: only then do its disks belong to ours."""
    same = all(draft.get(key) == source[key] for key in ("request", "vm"))
    return same and draft["snapshot"]["moref"] == source["snapshot"]["moref"]


def _described(disk: Disk, chosen: list[Disk]) -> dict[str, Any]:
    status = LEFT_OUT if disk.status == EXPORTED and disk not in chosen else disk.status
    return {
        "key": disk.key,
        "label": disk.label,
        "place": disk.place,
        "capacity": disk.capacity,
        "status": status,
    }


def _ovf_disk(manifest: Manifest, disk: Disk) -> OvfDisk:
    entry = next(each for each in manifest.entries if each.facts.get("disk") == disk.key)
    return OvfDisk(disk, entry.name, entry.size, entry.facts["populated"], entry.facts["lease_key"])


def _hint(store: Store, disk: Disk) -> int | None:
    """Bytes that the stream may have at the most, to size the parts of a store that cannot tell its free space.

    One that can must not be asked for room for all of a thin disk. Deflated grains of 64 KiB grow by 0.8 % at worst,
    marker and padding included, and 4 bytes of table each.
    """
    return None if store.usage().free is not None else disk.capacity + disk.capacity // 64 + MiB
