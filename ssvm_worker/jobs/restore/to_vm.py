"""A backup as a new VM: every disk goes straight from its store to the host, verified before the VM may stay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.manifest import Entry
from ssvm_worker.errors import CorruptImage, InvalidRequest, SourceUnavailable, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.parallel import in_parallel
from ssvm_worker.streaming.fan_out import store_stream
from ssvm_worker.streaming.interfaces import Check

from .backup_reader import BackupDisk, checked

if TYPE_CHECKING:
    from ssvm_worker.vmware.deploy import Import, ImportFile
    from ssvm_worker.vmware.lease import Lease
    from ssvm_worker.vmware.place import VmTarget
    from ssvm_worker.vmware.session import VCenterSession


def restore_vm(vcenter: str, place: VmTarget, attempt: Attempt, disks: list[BackupDisk]) -> dict[str, Any]:
    """Make the VM, send it its disks, and let it stay if all that was sent is what the manifest says.

    After an error the VM is gone: vSphere removes it with the lease.
    """
    descriptor = _descriptor(disks[0])
    attempt.progress.start("connecting")
    session: VCenterSession
    with attempt.doors.vcenter(vcenter, check=attempt.check) as session, session.deploy(place, attempt.job_id) as it:
        it.prepare(descriptor)
        parcels = [_parcel(wanted, disks) for wanted in it.wanted]
        for warning in it.warnings:
            attempt.log.warning("vCenter says of %s: %s", place.name, warning)
        attempt.progress.start("making the VM")
        lease = it.open()
        attempt.progress.start("restoring", sum(each.total for each in parcels))
        sent = _send_all(attempt, it, lease, parcels, session.options.parallel_disks)
        attempt.confirm()
        it.complete()
    return {"vm": lease.vm, "name": place.name, "files": sent, "warnings": it.warnings}


def remove_leftover(vcenter: str, place: VmTarget, attempt: Attempt) -> None:
    """Remove the VM that failed attempts have left, where vCenter lets us."""
    try:
        with attempt.doors.vcenter(vcenter, check=lambda: None) as session:
            session.deploy(place, attempt.job_id).remove_leftover()
    except InvalidRequest:
        return  # where there is no such place, there never was a VM
    except WorkerError as error:
        attempt.log.warning("it is not known whether job %s has left a VM: %s", attempt.job_id, error)


def _descriptor(disk: BackupDisk) -> str:
    """The OVF of the backup, its digest checked."""
    entry: Entry | None = next((each for each in disk.manifest.entries if each.role == "descriptor"), None)
    if entry is None:
        prefix = disk.manifest.artifact.prefix
        raise CorruptImage("The backup has no OVF descriptor", f"{disk.store.name}:{prefix}", "Restore its disks alone")
    key = disk.manifest.artifact.key(entry.name)
    return b"".join(checked(disk.attempt, disk.store, key, entry)).decode("utf-8", "replace")


@dataclass(frozen=True)
class _Parcel:
    """One file on its way to the host."""

    wanted: ImportFile
    label: str
    #: Bytes.
    size: int
    #: What its progress comes to.
    total: int
    chunks: Callable[[], Iterator[bytes]]
    #: Raises if what passed is not what was backed up.
    verify: Callable[[Hasher], None]


def _parcel(wanted: ImportFile, disks: list[BackupDisk]) -> _Parcel:
    """The stored object that the OVF calls so: a disk, or what lies beside them."""
    for disk in disks:
        if disk.file == wanted.name:
            image = partial(disk.image, "vmdk", disk.file)
            verify = partial(disk.refuse_other, "vmdk")
            return _Parcel(wanted, disk.label, disk.stream_size(), disk.total("vmdk"), image, verify)
    first, entry = disks[0], disks[0].manifest.entry(wanted.name)
    if entry is None:
        listed = ", ".join(each.name for each in first.manifest.entries)
        raise InvalidRequest(f"The OVF wants a file {wanted.name!r}", first.where, f"The backup has: {listed}")
    read = partial(checked, first.attempt, first.store, first.manifest.artifact.key(entry.name), entry)
    return _Parcel(wanted, entry.name, entry.size, 0, read, lambda _: None)


def _send_all(attempt: Attempt, it: Import, lease: Lease, parcels: list[_Parcel], most: int) -> list[dict[str, Any]]:
    """Send the files, *most* at once: one stream does not fill a host's line. One that fails stops the others."""
    sent: dict[int, dict[str, Any]] = {}
    failed = threading.Event()

    def check() -> None:
        lease.check()
        if failed.is_set():
            raise SourceUnavailable("Another file of the VM could not be sent", it.name, "See its own error")

    def one(number: int) -> None:
        try:
            sent[number] = _send(attempt, it, lease, parcels[number], check)
        except BaseException:
            failed.set()
            raise

    in_parallel(most, [partial(one, number) for number in range(len(parcels))])
    return [sent[number] for number in range(len(parcels))]


def _send(attempt: Attempt, it: Import, lease: Lease, parcel: _Parcel, check: Check) -> dict[str, Any]:
    """Send one file; what the host says that it got must be what was sent."""
    hasher = Hasher(lease.algorithm)

    def advance(_: bytes) -> None:
        lease.report(100 * attempt.progress.bytes // max(1, attempt.progress.total or 0))

    with it.sink(parcel.wanted, parcel.size) as sink:
        store_stream(
            parcel.chunks(),
            {"the host": sink},
            [hasher, advance],
            verify=partial(parcel.verify, hasher),
            check=check,
        )
    got = lease.sent(it.file_of(parcel.wanted))
    if got is not None and (got.size, got.digest) != (hasher.size, hasher.digest(got.digest.algorithm)):
        raise SourceUnavailable(
            f"The host says that it got {got.size} bytes with {got.digest}; "
            f"{hasher.size} with {hasher.digest(got.digest.algorithm)} were sent",
            parcel.label,
            "It is tried again; if that goes on, look at the host and the way to it",
        )
    return {"file": parcel.label, "size": hasher.size, "digest": str(hasher.digest()), "confirmed": got is not None}
