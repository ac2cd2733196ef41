"""Restore a backup as a new VM. Every disk is sent directly from its store to the host and is verified."""

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
from ssvm_worker.streaming.interfaces import Check
from ssvm_worker.streaming.pipeline import store_stream

from .backup_reader import BackupDisk, checked

if TYPE_CHECKING:
    from ssvm_worker.vmware.deploy import Import, ImportFile
    from ssvm_worker.vmware.lease import Lease
    from ssvm_worker.vmware.placement import VmTarget
    from ssvm_worker.vmware.session import VCenterSession


def restore_vm(vcenter: str, target: VmTarget, attempt: Attempt, disks: list[BackupDisk]) -> dict[str, Any]:
    """Create the VM, send its disks, and keep the VM if all data agrees with the manifest.

    After an error, vSphere removes the VM with the lease.
    Some versions of vSphere may give a wrong lease manifest. So the second import decides: if its manifest differs too,
    the VM is kept with a warning. With ``differing_lease_manifest = "fail"`` the first difference fails the job.
    """
    session: VCenterSession
    attempt.progress.start("connecting")
    with attempt.services.connections.vcenter(vcenter, attempt.check) as session:
        differing: list[str] = []
        try:
            return _import(session, target, attempt, disks, differing)
        except SourceUnavailable as error:
            if not differing or session.options.differing_lease_manifest == "fail":
                raise
            attempt.log.warning("%s: importing once more: %s", target.name, error)
        return _import(session, target, attempt, disks, differing)


def _import(
    session: VCenterSession, target: VmTarget, attempt: Attempt, disks: list[BackupDisk], differing: list[str]
) -> dict[str, Any]:
    """Import the VM once. *differing* has the differences of the lease manifest of an earlier import.

    Raises SourceUnavailable, and adds the differences to *differing*, if it was empty and the lease manifest differs.
    """
    with session.deploy(target, attempt.job_id) as new_vm:
        new_vm.prepare(_descriptor(disks[0]))
        uploads = [_upload(file, disks) for file in new_vm.files]
        for warning in new_vm.warnings:
            attempt.log.warning("vCenter warns about %s: %s", target.name, warning)
        attempt.progress.start("creating the VM")
        lease = new_vm.open()
        attempt.progress.start("restoring", sum(each.total for each in uploads))
        sent = _send_all(attempt, new_vm, lease, uploads, session.options.parallel_disks)
        found = [text for each in sent if (text := each.pop("differs"))]
        if found and not differing:
            differing += found
            raise SourceUnavailable(found[0], target.name, "Check the host and the network path to it")
        new_vm.warnings += found
        attempt.confirm()
        new_vm.complete()
    return {"vm": lease.vm, "name": target.name, "files": sent, "warnings": new_vm.warnings}


def remove_leftover(vcenter: str, target: VmTarget, attempt: Attempt) -> None:
    """Remove the VM that failed attempts have left behind, if vCenter allows it."""
    try:
        with attempt.services.connections.vcenter(vcenter, lambda: None) as session:
            session.deploy(target, attempt.job_id).remove_leftover()
    except InvalidRequest:
        return  # without the target, no attempt has created a VM
    except WorkerError as error:
        attempt.log.warning("job %s may have left a VM behind: %s", attempt.job_id, error)


def _descriptor(disk: BackupDisk) -> str:
    """Return the backup's OVF descriptor after a check of its digest."""
    entry: Entry | None = next((each for each in disk.manifest.entries if each.role == "descriptor"), None)
    if entry is None:
        prefix = disk.manifest.artifact.prefix
        raise CorruptImage("The backup has no OVF descriptor", f"{disk.store.name}:{prefix}", "Restore its disks alone")
    key = disk.manifest.artifact.key(entry.name)
    return b"".join(checked(disk.attempt, disk.store, key, entry)).decode("utf-8", "replace")


@dataclass(frozen=True)
class _Upload:
    """One file that the worker sends to the host."""

    file: ImportFile
    label: str
    #: Bytes.
    size: int
    #: The file's part of the progress total.
    total: int
    chunks: Callable[[], Iterator[bytes]]
    #: Raises an error if the sent data differs from the backup.
    verify: Callable[[Hasher], None]


def _upload(file: ImportFile, disks: list[BackupDisk]) -> _Upload:
    """Return the upload of the stored object that the OVF names: a disk or another file."""
    for disk in disks:
        if disk.file == file.name:
            image = partial(disk.image, "vmdk", disk.file)
            verify = partial(disk.verify_copy, "vmdk")
            return _Upload(file, disk.label, disk.stream_size(), disk.total("vmdk"), image, verify)
    first, entry = disks[0], disks[0].manifest.entry(file.name)
    if entry is None:
        listed = ", ".join(each.name for each in first.manifest.entries)
        raise InvalidRequest(f"The OVF names an unknown file {file.name!r}", first.where, f"The backup has: {listed}")
    read = partial(checked, first.attempt, first.store, first.manifest.artifact.key(entry.name), entry)
    return _Upload(file, entry.name, entry.size, 0, read, lambda _: None)


def _send_all(
    attempt: Attempt, new_vm: Import, lease: Lease, uploads: list[_Upload], max_parallel: int
) -> list[dict[str, Any]]:
    """Send the files in parallel, because one stream does not use a host's full bandwidth.

    The first failure stops the other files.
    """
    sent: dict[int, dict[str, Any]] = {}
    failed = threading.Event()

    def check() -> None:
        lease.check()
        if failed.is_set():
            raise SourceUnavailable("Another file of the VM could not be sent", new_vm.name, "Check the file's error")

    def one(number: int) -> None:
        try:
            sent[number] = _send(attempt, new_vm, lease, uploads[number], check)
        except BaseException:
            failed.set()
            raise

    in_parallel(max_parallel, [partial(one, number) for number in range(len(uploads))])
    return [sent[number] for number in range(len(uploads))]


def _send(attempt: Attempt, new_vm: Import, lease: Lease, upload: _Upload, check: Check) -> dict[str, Any]:
    """Send one file, and compare the sent data with the lease manifest: ``differs`` in the result is a difference."""
    hasher = Hasher(lease.algorithm)

    def advance(_: bytes) -> None:
        lease.report(100 * attempt.progress.bytes // max(1, attempt.progress.total or 0))

    with new_vm.sink(upload.file, upload.size) as sink:
        store_stream(
            upload.chunks(),
            {"the host": sink},
            [hasher, advance],
            verify=partial(upload.verify, hasher),
            check=check,
        )
    received = lease.manifest_entry(new_vm.file_of(upload.file))
    differs = ""
    if received is not None:
        digest = hasher.digest(received.digest.algorithm)
        if (received.size, received.digest) != (hasher.size, digest):
            differs = f"{upload.label}: vSphere says that it received {received.size} bytes with {received.digest}; "
            differs += f"the worker sent {hasher.size} with {digest}"
    return {
        "file": upload.label,
        "size": hasher.size,
        "digest": str(hasher.digest()),
        "confirmed": received is not None and not differs,
        "differs": differs,
    }
