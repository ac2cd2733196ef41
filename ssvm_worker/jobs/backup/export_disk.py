"""The export of one disk of a snapshot. Each disk has its own lease; after a failure, a new lease is tried."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ssvm_worker.artifacts.checksums import Hasher, digest_of
from ssvm_worker.artifacts.manifest import Entry
from ssvm_worker.errors import Cancelled, CorruptImage, LeaseLost, ResourceBusy, SourceUnavailable, WorkerError
from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.grain_store.writer import DiskPacker
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.store_set import StoreSet
from ssvm_worker.streaming.interfaces import Check, Observer
from ssvm_worker.streaming.pipeline import limit, store_stream
from ssvm_worker.units import MiB
from ssvm_worker.vmware.hardware import Disk, Hardware

from .incremental import Grains
from .power_watch import PowerWatch
from .snapshot_limits import SpaceWatch

if TYPE_CHECKING:
    from ssvm_worker.vmware.lease import Lease, LeaseFile
    from ssvm_worker.vmware.session import VM
    from ssvm_worker.vmware.snapshot import Snapshot

#: The errors after which a new lease is tried.
_RETRYABLE = (SourceUnavailable, LeaseLost, ResourceBusy)
#: Maximum bytes of the firmware's variables, which have 264 KiB for EFI and 8 KiB for BIOS.
_MAX_NVRAM = 16 * MiB
#: Leases for the nvram, if a host grants them but does not send it.
_NVRAM_TRIES = 2
_T = TypeVar("_T")


class DiskExport:
    """The export of disks of one snapshot. Threads may share it if each exports another disk."""

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
        #: Remarks about files that could not be stored and are no disks.
        self.remarks: list[str] = []
        #: The reason for each missing disk of the snapshot, by the key of the disk.
        self.missing: dict[int, str] = {}
        self._attempt = attempt
        self._targets = targets
        self._vm = vm
        self._snapshot = snapshot
        self._hardware = hardware
        self._grains = grains
        #: The keys of disks whose lease manifest differed from the received bytes once.
        self._differing: set[int] = set()
        #: The number of disks that have or request a lease, and its lock.
        self._open = 0
        self._lock = threading.Lock()
        #: None for a snapshot that another program made: the job would not remove it.
        self._space = SpaceWatch(attempt, vm) if snapshot.ours else None
        #: The watch of the VM's power state, with its warnings.
        self.power = PowerWatch(attempt, vm)

    def fetch(self, name: str, disk: Disk) -> list[Entry]:
        """Store a disk. Return no entry for a disk that the lease does not list, and record it in ``missing``.

        Another lease would not list it either.
        Raises the error of the last of ``lease_tries`` leases, or of the primary store.
        """
        return self._leased(disk.label, disk.key, partial(self._disk, name, disk))

    def fetch_nvram(self, name: str) -> list[Entry]:
        """Store the firmware's variables with a separate lease, because some hosts send one file of each lease.

        Call it before ``fetch``. A missing or unreadable nvram is only a remark, because many VMs boot without it.
        Raises the error of the last of ``lease_tries`` leases, or of the primary store.
        """
        remark = "The firmware is EFI, and the host offers no nvram: a restored VM may lack its boot entries"
        for _ in range(_NVRAM_TRIES):
            found = self._leased("nvram", None, _read_nvram)
            if isinstance(found, tuple):
                data, key = found
                self._targets.put(name, data)
                return [Entry(name, len(data), str(digest_of(data)), "nvram", {"lease_key": key})]
            if found is None and self._hardware.firmware != "efi":
                return []
            if found is None:
                break
            remark = f"The nvram was not stored: {found}"
        self.remarks.append(remark)
        self._attempt.log.warning("%s", remark)
        return []

    def _leased(self, what: str, key: int | None, use: Callable[[Lease], _T]) -> _T:
        """Return the result of *use* with the first of ``lease_tries`` leases that succeeds.

        *key* is the key of a disk. Occupies a slot of the ESXi host during each lease.
        """
        left = self._vm.options.lease_tries
        differed = False
        while True:
            others = self._open
            try:
                host = self._vm.host()
                with self._attempt.slot(f"esxi:{host}", self._vm.options.per_host):
                    # The wait for the slot may have been longer than the session's life: this logs in again too.
                    if self._vm.host() != host:
                        continue  # the VM was moved meanwhile, so another host's slot is necessary
                    with self._counted(), self._vm.export(self._snapshot) as lease:
                        result = use(lease)
                        lease.complete()
                        return result
            except _RETRYABLE as error:
                if self.power.wait():
                    continue
                if isinstance(error, ResourceBusy) and self._wait_for_other_lease(others):
                    continue
                if key in self._differing and not differed:
                    differed = True  # the second lease decides, so the first does not count as a try
                    left += 1
                left -= 1
                if left <= 0:
                    raise
                self._attempt.log.warning("%s: trying another lease: %s", what, error)
            self._attempt.wait(self._vm.options.lease_delay_s)

    def _wait_for_other_lease(self, others: int) -> bool:
        """Wait until no other disk of this job has a lease. Return whether one had, which may be why vSphere is busy.

        *others* is their number before the request. It is not documented whether a VM may have two leases. If it may
        not, the job exports its disks one by one.
        """
        if not others and not self._open:
            return False
        self._attempt.log.info("vSphere gives no second lease for %s: waiting for the other disk", self._vm.moref)
        while self._open:
            self._attempt.wait(min(1.0, self._vm.options.lease_delay_s))
        return True

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def _disk(self, name: str, disk: Disk, lease: Lease) -> list[Entry]:
        file = lease.file_of(disk, self._hardware.disks)
        if file is None:
            listed = ", ".join(each.key for each in lease.files) or "nothing"
            self.missing[disk.key] = f"the host offers no file for it; it offers: {listed}"
            return []
        try:
            return [self._store(name, disk, lease, file)]
        except CorruptImage as error:
            # Status 200 proves nothing: hosts end a body properly although the disk is incomplete.
            raise SourceUnavailable(
                f"The host did not send the whole disk: {error.what}",
                f"{disk.label} ({disk.place})",
                "The worker tries again. If the error persists, check the host and its datastore",
            ) from error

    def _store(self, name: str, disk: Disk, lease: Lease, file: LeaseFile) -> Entry:
        """Store a disk as its stream or, in an incremental backup, as its new grains."""
        if self._grains is None:
            return self._stream(name, disk, lease, file)
        with self._grains.start(disk) as packing:
            return self._grains.entry(packing, self._stream(name, disk, lease, file, packing))

    def _stream(self, name: str, disk: Disk, lease: Lease, file: LeaseFile, packing: DiskPacker | None = None) -> Entry:
        take = packing.take if packing else None
        # Only the structure and the Adler-32 of every grain prove a stream that the lease manifest contradicts.
        every = 1 if disk.key in self._differing else self._vm.options.inflate_every
        verifier = StreamOptimized(disk.label, disk.capacity, every, take=take)
        hasher = Hasher(lease.algorithm)
        watches = [self.power.check, *([self._space.check] if self._space else [])]
        progress = _StreamProgress(self._attempt, verifier, lease, disk.capacity, watches)
        room = self._attempt.held.part()
        agreed: list[str] = []
        broken: list[SourceUnavailable] = []

        def verify() -> None:
            _finish(verifier, broken)
            agreed.append(self._compare_with_manifest(disk, lease, file, hasher))
            lease.check()
            self._attempt.confirm()

        try:
            with ExitStack() as stack:
                chunks: Iterator[bytes] = _until_broken(lease.source(file, self._targets.chunk_size).open(), broken)
                observers: list[Observer] = [hasher, verifier, progress]
                if not packing:
                    observers.append(room.took)
                make = self._targets.disk_sink(name, disk)
                if self._grains and packing:
                    chunks, observers = packing.stream(chunks, lease.check, *observers), []
                    make = self._grains.sink(name, packing)
                sinks = self._targets.open_sinks(stack, make)
                min_rate = self._attempt.settings.worker.min_store_rate or 0
                stored = store_stream(chunks, sinks, observers, verify=verify, check=lease.check, min_rate=min_rate)
        except BaseException:
            progress.take_back()
            room.take_back()
            raise
        self._targets.owed |= stored.owed
        for warning in verifier.warnings:
            self._attempt.log.warning("%s: %s", disk.label, warning)
        facts = self._facts(disk, file, verifier, every) | {"lease_manifest": agreed[0]}
        return Entry(name, hasher.size, str(hasher.digest()), "disk", facts)

    def _compare_with_manifest(self, disk: Disk, lease: Lease, file: LeaseFile, hasher: Hasher) -> str:
        """Compare the received bytes with the lease manifest. Return ``agreed``, ``absent`` or ``differs``.

        Some versions of vSphere may give a wrong manifest of an export. So the second lease decides: if its manifest
        differs too, and each of its grains is intact, the disk is stored with a remark.
        Raises SourceUnavailable for the first difference, and for each one if the settings say ``fail``.
        """
        sent = lease.manifest_entry(file)
        if sent is None or (sent.digest.algorithm != lease.algorithm and sent.size == hasher.size):
            return "absent"
        if sent.size == hasher.size and sent.digest == hasher.digest(sent.digest.algorithm):
            return "agreed"
        what = f"vSphere says that it sent {sent.size} bytes with {sent.digest}; the worker received {hasher.size}"
        if self._vm.options.differing_lease_manifest == "warn" and disk.key in self._differing:
            self.remarks.append(f"{disk.label}: {what} with another digest, twice. Every grain is intact")
            self._attempt.log.warning("%s", self.remarks[-1])
            return "differs"
        self._differing.add(disk.key)
        raise SourceUnavailable(
            f"{what} with another digest",
            file.name,
            "The worker tries again. If the error persists, check the network path to the host",
        )

    def _facts(self, disk: Disk, file: LeaseFile, verifier: StreamOptimized, every: int) -> dict[str, Any]:
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


def _read_nvram(lease: Lease) -> tuple[bytes, str] | WorkerError | None:
    """Return content and key of the lease's nvram, or the error of the read. Return None if the lease lists none."""
    file = next((each for each in lease.files if not each.is_disk and each.name.endswith(".nvram")), None)
    if file is None:
        return None
    try:
        data = b"".join(limit(lease.source(file).open(), _MAX_NVRAM, file.name))
        if not data or file.size not in (None, len(data)):
            raise SourceUnavailable(f"{len(data)} bytes received, {file.size} expected", file.name)
    except Cancelled:
        raise
    except WorkerError as error:
        return error
    return data, file.key


def _until_broken(chunks: Iterator[bytes], broken: list[SourceUnavailable]) -> Iterator[bytes]:
    """Yield the chunks until their end or their error, which goes to *broken*."""
    try:
        yield from chunks
    except SourceUnavailable as error:
        broken.append(error)


def _finish(verifier: StreamOptimized, broken: list[SourceUnavailable]) -> None:
    """Raise the error that ended the stream, unless the stream is complete. Without an error, raise CorruptImage.

    Some hosts may end the connection of a complete stream without a last chunk or TLS's close_notify. The stream's own
    end marker proves more than either.
    """
    try:
        verifier.finish()
    except CorruptImage:
        if broken:
            raise broken[0] from broken[0].__cause__
        raise
    verifier.warnings += [f"the stream is complete, but its connection ended with an error: {each}" for each in broken]


class _StreamProgress:
    """An observer that reports the progress of a stream. It must run after the verifier, which knows the position."""

    def __init__(
        self, attempt: Attempt, verifier: StreamOptimized, lease: Lease, capacity: int, watches: Sequence[Check]
    ) -> None:
        self._watches = watches
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
        for watch in self._watches:
            watch()

    def take_back(self) -> None:
        """Subtract the bytes of a failed stream, which the next lease transfers again."""
        self._attempt.progress.skip(-self._seen)
