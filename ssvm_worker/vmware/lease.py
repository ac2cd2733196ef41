"""One NFC lease: opened on a snapshot, kept alive in a thread of its own, completed or aborted whatever happens."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.errors import LeaseLost
from ssvm_worker.units import human_duration

from .connection import Connection
from .export import DiskSource, ExportLink
from .faults import API_ERRORS, fault_name, meaning, translated
from .hardware import EXPORTED, Disk, family
from .trust import thumbprint_of

#: Seconds between two renewals at the most; the server's own limit is 300 s as a rule.
_RENEW_S = 30.0
#: What a call answers when the lease, or its session, is no more.
_GONE = (vim.fault.Timedout, vim.fault.NotAuthenticated, vmodl.fault.ManagedObjectNotFound)
#: /vm-12/ParaVirtualSCSIController0:1 names a device by its place.
_PLACE = re.compile(r"(\w*Controller)(\d+):(\d+)$")


@dataclass(frozen=True)
class LeaseFile:
    """One file that a lease offers."""

    #: How OVF calls name the device.
    key: str
    url: str
    #: Of the certificate that the host shows; may be empty.
    thumbprint: str
    is_disk: bool
    #: Bytes, where they are known beforehand: not of disks.
    size: int | None = None
    #: Of an import: how the import specification calls the place of the file.
    import_key: str = ""

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Sent:
    """What vSphere says that it sent of a file."""

    digest: Digest
    size: int


class Lease:
    """A context manager: leaving it aborts the lease, unless it was completed.

    vSphere keeps the VM from being moved, changed or deleted as long as it is open. It belongs to its login session.
    """

    def __init__(self, connection: Connection, start: Callable[[], Any], where: str, ready_s: float) -> None:
        """*start* asks for it; *ready_s*: seconds that the host may take to get the lease ready."""
        self.files: tuple[LeaseFile, ...] = ()
        #: The VM's managed object id, when the lease is ready.
        self.vm = ""
        #: The algorithm of the lease manifest.
        self.algorithm = "sha256"
        self._connection = connection
        self._start = start
        self._where = where
        self._ready_s = ready_s
        self._it: Any = None
        self._percent = 0
        self._lost: LeaseLost | None = None
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None

    def __enter__(self) -> Lease:
        """Open it and wait until it is ready.

        Raises ResourceBusy (another task or lease holds the VM), LeaseLost (never ready, or at once in error), others.
        """
        with translated("Asking for a lease", self._where):
            self._it = self._start()
        try:
            self._be_ready()
        except BaseException:
            self._abort()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end_renewals()
        if self._it is not None:
            self._abort()

    def check(self) -> None:
        """Raise Cancelled if the job must stop, LeaseLost if the lease is gone."""
        self._connection.check()
        if self._lost is not None:
            raise self._lost

    def report(self, percent: int) -> None:
        """Say how far the transfer is; sent with the next renewal."""
        self._percent = max(0, min(100, percent))

    def file_of(self, disk: Disk, disks: Sequence[Disk]) -> LeaseFile | None:
        """The file of one of the VM's *disks*; None when the lease does not list it."""
        return match_files(self.files, disks).get(disk.key)

    def source(self, file: LeaseFile) -> DiskSource:
        """The bytes of one file of this lease; they end with the lease."""
        link = ExportLink(file.url, file.thumbprint, self._connection.address, self._connection.cookie)
        return DiskSource(link, self.check)

    def sent(self, file: LeaseFile) -> Sent | None:
        """The lease manifest's word on a file that was read to its end; None where the server has none.

        Raises LeaseLost if the lease is gone, SourceUnavailable.
        """
        with translated("Asking for the lease manifest", self._where):
            try:
                entries = self._it.HttpNfcLeaseGetManifest()
            except _GONE as error:
                what = f"The lease ended before its manifest was read: {fault_name(error)}"
                raise LeaseLost(what, self._where, "It is tried again") from error
            except vmodl.MethodFault:
                # No real host was at hand to see which of them give a manifest of an export: without one, the stream's
                # own structure has to do, and the backup says so.
                return None
        entry = next((each for each in entries if each.key == file.key), None)
        return _sent(entry) if entry else None

    def complete(self) -> None:
        """Tell that all is well: the data was verified. A lease that is gone by now does no harm to it."""
        self._end_renewals()
        it, self._it = self._it, None
        with contextlib.suppress(*API_ERRORS), self._connection.shielded():
            it.HttpNfcLeaseComplete()

    def finish(self) -> None:
        """``complete`` of an import, which comes to nothing if vSphere has given it up: LeaseLost, and others."""
        self._end_renewals()
        with translated("Completing the import", self._where):
            self._it.HttpNfcLeaseComplete()
        self._it = None

    def _be_ready(self) -> None:
        with translated("Waiting for the lease", self._where):
            ended = ("ready", "error", "done")
            seen = self._connection.wait(
                self._it, ("state", "info", "error"), lambda seen: seen["state"] in ended, self._ready_s
            )
        if seen is None:
            what = f"The host had no lease ready within {human_duration(self._ready_s)}"
            raise LeaseLost(what, self._where, "Look at the host's load, or raise backup.lease_ready_s")
        if seen["state"] != "ready":
            raise self._refused(seen["error"])
        self.files = tuple(_file(each) for each in seen["info"].deviceUrl)
        self.vm = seen["info"].entity._moId
        self._want_sha256()
        interval = min(seen["info"].leaseTimeout / 5, _RENEW_S)
        self._renewer = threading.Thread(target=self._renew, args=(interval,), name="nfc-lease", daemon=True)
        self._renewer.start()

    def _want_sha256(self) -> None:
        """Ask for SHA-256 in the lease manifest, which must be done before any transfer; before 6.7 it is SHA-1."""
        chosen = [vim.KeyValue(key=each.key, value="sha256") for each in self.files]
        with translated("Asking for SHA-256", self._where):
            try:
                self._it.HttpNfcLeaseSetManifestChecksumType(chosen)
            except vmodl.MethodFault:
                self.algorithm = "sha1"

    def _refused(self, fault: Any) -> Exception:
        if isinstance(fault, vmodl.MethodFault):
            return meaning(fault, "The host gives no lease", self._where)
        return LeaseLost("The host gives no lease", self._where, "Look at its events")

    def _renew(self, interval_s: float) -> None:
        with self._connection.shielded():
            self._renew_until_stopped(interval_s)

    def _renew_until_stopped(self, interval_s: float) -> None:
        """A renewal that does not get through is tried again: only vSphere's word counts."""
        while not self._stop.wait(interval_s):
            try:
                self._it.HttpNfcLeaseProgress(self._percent)
            except vmodl.MethodFault as error:
                what = f"vSphere has ended the lease: {fault_name(error)}"
                self._lost = LeaseLost(what, self._where, "It is tried again; a slow store may be the reason")
                return
            except API_ERRORS:
                continue

    def _end_renewals(self) -> None:
        self._stop.set()
        if self._renewer is not None:
            self._renewer.join(self._connection.address.timeout_s)

    def _abort(self) -> None:
        """Give it back; a lease that is gone already is fine."""
        it, self._it = self._it, None
        with contextlib.suppress(*API_ERRORS), self._connection.shielded():
            it.HttpNfcLeaseAbort()


def _file(device: Any) -> LeaseFile:
    """The certificate itself (since 9.0) says more than its SHA-1."""
    pin = thumbprint_of(device.sslCertificate or "") or device.sslThumbprint or ""
    return LeaseFile(device.key, device.url, pin, bool(device.disk), device.fileSize or None, device.importKey or "")


def _sent(entry: Any) -> Sent:
    if entry.checksum and entry.checksumType in ("sha1", "sha256"):
        return Sent(Digest(entry.checksumType, entry.checksum.lower()), entry.size)
    return Sent(Digest("sha1", entry.sha1.lower()), entry.size)


def match_files(files: Sequence[LeaseFile], disks: Sequence[Disk]) -> dict[int, LeaseFile]:
    """Which file is which disk's, by the disk's key.

    By the place in the device key where it has that form; else by their order, where the numbers agree: a host may or
    may not list disks that no snapshot holds. The stream's own header still has to agree with the disk's capacity.
    """
    offered = [each for each in files if each.is_disk]
    placed = {_place(each.key): each for each in offered}
    if None not in placed:
        found = {disk.key: placed.get((family(disk.controller.kind), disk.controller.bus, disk.unit)) for disk in disks}
        return {key: file for key, file in found.items() if file is not None}
    for candidates in (disks, [disk for disk in disks if disk.status == EXPORTED]):
        if len(candidates) == len(offered):
            return {disk.key: file for disk, file in zip(candidates, offered, strict=True)}
    return {}


def _place(key: str) -> tuple[str, int, int] | None:
    match = _PLACE.search(key)
    return (family(match[1]), int(match[2]), int(match[3])) if match else None
