"""An NFC lease: opened on a snapshot or an import, renewed by its own thread, and always completed or aborted."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.errors import LeaseLost
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.units import human_duration

from .connection import Connection
from .export import DiskSource, ExportLink, pins_of
from .faults import API_ERRORS, as_worker_error, fault_name, translated
from .hardware import EXPORTED, Disk, family

#: Maximum seconds between two renewals. The server's own limit is usually 300 s.
_RENEW_S = 30.0
#: The faults of a call after the end of the lease or of its session.
_GONE = (vim.fault.Timedout, vim.fault.NotAuthenticated, vmodl.fault.ManagedObjectNotFound)
#: The faults of a renewal that no later renewal can repair. All others, such as SystemError, may pass.
_ENDED = (*_GONE, vim.fault.InvalidState, vmodl.fault.SecurityError)
#: /vm-12/ParaVirtualSCSIController0:1 names a device by controller, bus and unit.
_DEVICE_KEY = re.compile(r"(\w*Controller)(\d+):(\d+)$")


@dataclass(frozen=True)
class LeaseFile:
    """One file in a lease."""

    #: The name of the device in OVF calls.
    key: str
    url: str
    #: Thumbprints of the host's certificate, as in ExportLink; may be empty.
    thumbprint: str
    is_disk: bool
    #: Bytes, if the lease gives them. It gives none for disks.
    size: int | None = None
    #: The key of the file in the specification of an import.
    import_key: str = ""

    @property
    def name(self) -> str:
        """Return the last part of the URL."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class LeaseManifestEntry:
    """Size and digest of one file, as vSphere counted them."""

    digest: Digest
    size: int


class Lease:
    """A lease as a context manager. On exit, it aborts the lease unless the lease was completed.

    While a lease is open, vSphere does not move, change or delete the VM. A lease belongs to its login session.
    """

    def __init__(self, connection: Connection, start: Callable[[], Any], where: str, ready_s: float) -> None:
        """Prepare the lease that *start* requests; the host has *ready_s* seconds to make it ready."""
        self.files: tuple[LeaseFile, ...] = ()
        #: The VM's managed object id, once the lease is ready.
        self.vm = ""
        #: The hash algorithm of the lease manifest.
        self.algorithm = "sha256"
        self._connection = connection
        self._start = start
        self._where = where
        self._ready_s = ready_s
        self._lease: Any = None
        self._percent = 0
        self._lost: LeaseLost | None = None
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None

    def __enter__(self) -> Lease:
        """Open the lease and wait until it is ready.

        Raises ResourceBusy if another task or lease uses the VM, and LeaseLost if the lease does not become ready.
        May raise other WorkerErrors.
        """
        with translated("Requesting a lease", self._where):
            self._lease = self._start()
        try:
            self._wait_until_ready()
        except BaseException:
            self._abort()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end_renewals()
        if self._lease is not None:
            self._abort()

    def check(self) -> None:
        """Raise Cancelled if the job must stop, and LeaseLost if the lease has ended."""
        self._connection.check()
        if self._lost is not None:
            raise self._lost

    def report(self, percent: int) -> None:
        """Set the progress that the next renewal sends."""
        self._percent = max(0, min(100, percent))

    def file_of(self, disk: Disk, disks: Sequence[Disk]) -> LeaseFile | None:
        """Return the file of one of the VM's *disks*, or None if the lease does not list it."""
        return match_files(self.files, disks).get(disk.key)

    def source(self, file: LeaseFile, chunk_size: int = CHUNK) -> DiskSource:
        """Return the source of a file, in chunks of at most *chunk_size* bytes. It is readable until the lease ends."""
        link = ExportLink(file.url, file.thumbprint, self._connection.address, self._connection.cookie)
        return DiskSource(link, self.check, chunk_size)

    def manifest_entry(self, file: LeaseFile) -> LeaseManifestEntry | None:
        """Return the lease manifest's entry for a file that was transferred completely, or None if there is none.

        Raises LeaseLost if the lease has ended, and SourceUnavailable.
        """
        with translated("Reading the lease manifest", self._where):
            try:
                entries = self._lease.HttpNfcLeaseGetManifest()
            except _GONE as error:
                what = f"The lease ended before its manifest was read: {fault_name(error)}"
                raise LeaseLost(what, self._where, "The worker tries again") from error
            except vmodl.MethodFault:
                # It is not known which real hosts give a manifest of an export. Without a manifest, the worker checks
                # only the structure of the stream, and the backup records this.
                return None
        entry = next((each for each in entries if each.key == file.key), None)
        if entry is None:
            return None
        if entry.checksum and entry.checksumType in ("sha1", "sha256"):
            return LeaseManifestEntry(Digest(entry.checksumType, entry.checksum.lower()), entry.size)
        return LeaseManifestEntry(Digest("sha1", entry.sha1.lower()), entry.size)

    def complete(self) -> None:
        """Complete the lease of an export. Errors are ignored: the worker has already verified the data."""
        self._end_renewals()
        lease, self._lease = self._lease, None
        with contextlib.suppress(*API_ERRORS), self._connection.shielded():
            lease.HttpNfcLeaseComplete()

    def finish(self) -> None:
        """Complete the lease of an import. Raises LeaseLost or another WorkerError if vSphere has ended the lease."""
        self._end_renewals()
        with translated("Completing the import", self._where):
            self._lease.HttpNfcLeaseComplete()
        self._lease = None

    def _wait_until_ready(self) -> None:
        ended = ("ready", "error", "done")
        paths = ("state", "info", "error")
        with translated("Waiting for the lease", self._where):
            values = self._connection.wait(self._lease, paths, lambda found: found["state"] in ended, self._ready_s)
        if values is None:
            what = f"The host did not make the lease ready within {human_duration(self._ready_s)}"
            raise LeaseLost(what, self._where, "Check the host's load, or raise backup.lease_ready_s")
        if values["state"] != "ready":
            what, fault = "The host grants no lease", values["error"]
            if isinstance(fault, vmodl.MethodFault):
                raise as_worker_error(fault, what, self._where)
            raise LeaseLost(what, self._where, "Check the host's events")
        self.files = tuple(
            LeaseFile(
                each.key,
                each.url,
                pins_of(each.sslCertificate, each.sslThumbprint),
                bool(each.disk),
                each.fileSize or None,
                each.importKey or "",
            )
            for each in values["info"].deviceUrl
        )
        self.vm = values["info"].entity._moId
        self._request_sha256()
        args = (values["info"].leaseTimeout,)
        self._renewer = threading.Thread(target=self._renew, args=args, name="nfc-lease", daemon=True)
        self._renewer.start()

    def _request_sha256(self) -> None:
        """Request SHA-256 for the lease manifest before any transfer. vSphere before 6.7 supports only SHA-1."""
        chosen = [vim.KeyValue(key=each.key, value="sha256") for each in self.files]
        with translated("Requesting SHA-256", self._where):
            try:
                self._lease.HttpNfcLeaseSetManifestChecksumType(chosen)
            except vmodl.MethodFault:
                self.algorithm = "sha1"

    def _renew(self, timeout_s: float) -> None:
        """Renew the lease until it is stopped, vSphere reports its end, or no renewal succeeds for *timeout_s*.

        One failed renewal does not end the export, for any exception: the host may still send the data.
        """
        with self._connection.shielded():
            renewed = time.monotonic()
            while not self._stop.wait(min(timeout_s / 5, _RENEW_S)):
                try:
                    self._lease.HttpNfcLeaseProgress(self._percent)
                    renewed = time.monotonic()
                except _ENDED as error:
                    self._lose(f"vSphere has ended the lease: {fault_name(error)}")
                    return
                except Exception as error:  # noqa: BLE001 - an ended thread would lose the lease without a message
                    if time.monotonic() - renewed > timeout_s:
                        self._lose(f"No renewal of the lease succeeded for {human_duration(timeout_s)}: {error!r}")
                        return

    def _lose(self, what: str) -> None:
        self._lost = LeaseLost(what, self._where, "The worker tries again; a slow store can be the reason")

    def _end_renewals(self) -> None:
        self._stop.set()
        if self._renewer is not None:
            self._renewer.join(self._connection.address.timeout_s)

    def _abort(self) -> None:
        """Abort the lease. Errors are ignored: the lease may have ended already."""
        lease, self._lease = self._lease, None
        with contextlib.suppress(*API_ERRORS), self._connection.shielded():
            lease.HttpNfcLeaseAbort()


def match_files(files: Sequence[LeaseFile], disks: Sequence[Disk]) -> dict[int, LeaseFile]:
    """Return the file of each disk, by the key of the disk.

    If every device key names controller, bus and unit, these decide. Otherwise the order decides, if the numbers of
    files and disks agree. A host may or may not list disks that no snapshot contains, so both numbers are tried.
    The caller must still compare the disk's capacity with the header of the stream.
    """
    offered = [each for each in files if each.is_disk]
    by_place = {_place(each.key): each for each in offered}
    if None not in by_place:
        places = {disk.key: (family(disk.controller.kind), disk.controller.bus, disk.unit) for disk in disks}
        return {key: by_place[place] for key, place in places.items() if place in by_place}
    for candidates in (disks, [disk for disk in disks if disk.status == EXPORTED]):
        if len(candidates) == len(offered):
            return {disk.key: file for disk, file in zip(candidates, offered, strict=True)}
    return {}


def has_place(key: str) -> bool:
    """Return whether a device key names controller, bus and unit."""
    return _place(key) is not None


def _place(key: str) -> tuple[str, int, int] | None:
    match = _DEVICE_KEY.search(key)
    return (family(match[1]), int(match[2]), int(match[3])) if match else None
