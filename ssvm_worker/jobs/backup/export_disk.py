"""One disk of a snapshot: fetched by a lease of its own, and by another one if that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ssvm_worker.artifacts.checksums import Hasher, digest_of
from ssvm_worker.artifacts.manifest import Entry
from ssvm_worker.errors import Cancelled, CorruptImage, LeaseLost, ResourceBusy, SourceUnavailable, WorkerError
from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.grain_store.writer import DiskPacker
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.store_set import StoreSet
from ssvm_worker.streaming.fan_out import store_stream
from ssvm_worker.streaming.interfaces import Observer
from ssvm_worker.streaming.pipeline import limit
from ssvm_worker.units import MiB
from ssvm_worker.vmware.hardware import Disk, Hardware

from .incremental import Grains

if TYPE_CHECKING:
    from ssvm_worker.vmware.lease import Lease, LeaseFile
    from ssvm_worker.vmware.session import VM
    from ssvm_worker.vmware.snapshot import Snapshot

#: What a new lease may put right.
_TRY_AGAIN = (SourceUnavailable, LeaseLost, ResourceBusy)
#: The firmware's variables are 264 KiB for EFI, 8 KiB for BIOS.
_NVRAM_MOST = 16 * MiB


class DiskExport:
    """Fetches disks of one snapshot; threads may share it, each with a disk of its own."""

    def __init__(
        self,
        attempt: Attempt,
        targets: StoreSet,
        vm: VM,
        snapshot: Snapshot,
        hardware: Hardware,
        *,
        grains: Grains | None = None,
    ) -> None:
        #: What could not be stored and is no disk.
        self.remarks: list[str] = []
        #: Why a disk could not be stored that the snapshot holds, by its key.
        self.missing: dict[int, str] = {}
        self._attempt = attempt
        self._targets = targets
        self._vm = vm
        self._snapshot = snapshot
        self._hardware = hardware
        self._grains = grains

    def fetch(self, name: str, disk: Disk, nvram: str = "") -> list[Entry]:
        """Store a disk, and the firmware's variables as *nvram* if they are wanted and there are any.

        A disk that the lease does not list is noted in ``missing``: another lease would not list it either.
        Raises what the last of ``lease_tries`` leases, or the primary store, raised. Holds a slot of the ESXi host.
        """
        left = self._vm.options.lease_tries
        while True:
            try:
                self._vm.revive()
                with self._attempt.slot(f"esxi:{self._vm.host()}", self._vm.options.per_host):
                    return self._one_lease(name, disk, nvram)
            except _TRY_AGAIN as error:
                left -= 1
                if left <= 0:
                    raise
                self._attempt.log.warning("%s: another lease is tried: %s", disk.label, error)
            self._attempt.wait(self._vm.options.lease_delay_s)

    def _one_lease(self, name: str, disk: Disk, nvram: str) -> list[Entry]:
        with self._vm.export(self._snapshot) as lease:
            file = lease.file_of(disk, self._hardware.disks)
            if file is None:
                listed = ", ".join(each.key for each in lease.files) or "nothing"
                self.missing[disk.key] = f"the host offers no file for it; it offers: {listed}"
            try:
                entries = [self._store(name, disk, lease, file)] if file else []
            except CorruptImage as error:
                # A 200 proves nothing: hosts end a body properly though the disk is not whole.
                raise SourceUnavailable(
                    f"The host did not send the whole disk: {error.what}",
                    f"{disk.label} ({disk.place})",
                    "It is fetched again; if that goes on, look at the host and its datastore",
                ) from error
            if nvram:
                # Behind the disk: some hosts send nothing more of a lease once one of its files was read.
                entries += self._nvram(nvram, lease)
            lease.complete()
        return entries

    def _store(self, name: str, disk: Disk, lease: Lease, file: LeaseFile) -> Entry:
        """As the file that it comes as, or as those of its grains that are new."""
        if self._grains is None:
            return self._stream(name, disk, lease, file)
        with self._grains.start(disk) as packing:
            entry = self._grains.entry(packing, self._stream(name, disk, lease, file, packing))
            self._attempt.held.add(packing.new_bytes)
            return entry

    def _stream(self, name: str, disk: Disk, lease: Lease, file: LeaseFile, packing: DiskPacker | None = None) -> Entry:
        take = packing.take if packing else None
        verifier = StreamOptimized(disk.label, disk.capacity, self._vm.options.inflate_every, take=take)
        hasher = Hasher(lease.algorithm)
        advance = _Advance(self._attempt, verifier, lease, disk.capacity)
        room = self._attempt.held.part()
        agreed: list[str] = []

        def verify() -> None:
            verifier.finish()
            agreed.append(_agree(lease, file, hasher))
            lease.check()
            self._attempt.confirm()

        try:
            with ExitStack() as stack:
                chunks: Iterator[bytes] = lease.source(file).open()
                observers: list[Observer] = [hasher, verifier, advance]
                if not packing:
                    observers.append(room.took)
                make = self._targets.file(name, disk)
                if self._grains and packing:
                    chunks, observers = packing.stream(chunks, lease.check, *observers), []
                    make = self._grains.sink(name, packing)
                sinks = self._targets.open(stack, make)
                min_rate = self._attempt.limits.min_store_rate
                stored = store_stream(chunks, sinks, observers, verify=verify, check=lease.check, min_rate=min_rate)
        except BaseException:
            advance.take_back()
            room.take_back()
            raise
        self._targets.owed |= stored.owed
        for warning in verifier.warnings:
            self._attempt.log.warning("%s: %s", disk.label, warning)
        facts = self._facts(disk, file, verifier) | {"lease_manifest": agreed[0]}
        return Entry(name, hasher.size, str(hasher.digest()), "disk", facts)

    def _facts(self, disk: Disk, file: LeaseFile, verifier: StreamOptimized) -> dict[str, Any]:
        every = self._vm.options.inflate_every
        return {
            "format": "vmdk",
            "virtual_size": disk.capacity,
            "disk": disk.key,
            "lease_key": file.key,
            "populated": verifier.data_bytes,
            "change_id": disk.change_id,
            "verified": f"adler32/{every}" if every else "structure",
            "warnings": verifier.warnings,
        }

    def _nvram(self, name: str, lease: Lease) -> list[Entry]:
        """The firmware's variables; a VM boots without them as a rule, so that a failure is a remark."""
        file = next((each for each in lease.files if not each.is_disk and each.name.endswith(".nvram")), None)
        if file is None:
            return []
        try:
            data = b"".join(limit(lease.source(file).open(), _NVRAM_MOST, name))
            if not data or file.size not in (None, len(data)):
                raise SourceUnavailable(f"{len(data)} bytes came, not {file.size}", file.name)
        except Cancelled:
            raise
        except WorkerError as error:
            self.remarks.append(f"The nvram was not stored: {error}")
            self._attempt.log.warning("the nvram is left out: %s", error)
            return []
        self._targets.put(name, data)
        return [Entry(name, len(data), str(digest_of(data)), "nvram", {"lease_key": file.key})]


def _agree(lease: Lease, file: LeaseFile, hasher: Hasher) -> str:
    """What became of the comparison with the lease manifest: agreed or absent; SourceUnavailable if they differ."""
    sent = lease.sent(file)
    if sent is None or (sent.digest.algorithm != lease.algorithm and sent.size == hasher.size):
        return "absent"
    if sent.size != hasher.size or sent.digest != hasher.digest(sent.digest.algorithm):
        raise SourceUnavailable(
            f"vSphere says that it sent {sent.size} bytes with {sent.digest}; {hasher.size} came, with another digest",
            file.name,
            "It is fetched again; if that goes on, look at the way to the host",
        )
    return "agreed"


class _Advance:
    """Observes chunks behind the verifier, and tells how far the stream has got by its own account."""

    def __init__(self, attempt: Attempt, verifier: StreamOptimized, lease: Lease, capacity: int) -> None:
        self._attempt = attempt
        self._verifier = verifier
        self._lease = lease
        self._capacity = capacity
        self._seen = 0

    def __call__(self, _: bytes) -> None:
        step = self._verifier.lba_bytes - self._seen
        self._seen += step
        self._attempt.progress.advance(step)
        self._lease.report(100 * self._seen // self._capacity)

    def take_back(self) -> None:
        """What came is fetched again, if it is at all."""
        self._attempt.progress.advance(-self._seen)
