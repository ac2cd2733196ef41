"""One session with a vCenter or ESXi host: all that a backup asks of it, in plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssvm_worker.streaming.interfaces import Check

from . import inventory, preflight
from . import snapshot as snapshots
from .address import Address
from .changed_blocks import Area, changed_areas
from .connection import Connection
from .deploy import Import
from .descriptor import config_json, server_descriptor
from .finding import PreflightFinding
from .hardware import Disk, Hardware
from .lease import Lease
from .old_snapshots import OldSnapshot, find_leftovers
from .ovf import OvfDisk, OvfFile, build
from .place import VmTarget
from .snapshot import Snapshot

__all__ = ["VM", "Address", "ExportOptions", "VCenterSession"]


@dataclass(frozen=True)
class ExportOptions:
    """How snapshots are exported; the [backup] section of the settings."""

    #: Ask the guest to bring its file systems to rest.
    quiesce: bool = True
    #: Seconds that a host may take to get a lease ready.
    lease_ready_s: float = 300.0
    #: Leases for one disk before the attempt fails.
    lease_tries: int = 3
    #: Seconds between two of them.
    lease_delay_s: float = 15.0
    #: Every Nth grain is inflated and its Adler-32 checked; 0 checks the structure only.
    inflate_every: int = 0
    #: Disks of one VM at once, and disks of one ESXi host at once by all workers.
    parallel_disks: int = 2
    per_host: int = 2
    #: Hours that the removal of a snapshot, and consolidation, may take.
    remove_hours: float = 12.0
    #: Bytes that a disk's stream may have in a scratch file for a slow store, and where; None for no file.
    spill_bytes: int = 0
    spill_dir: Path | None = None


class VCenterSession:
    """A context manager: entering logs in, leaving logs out. Open it in the process and thread that use it.

    Entering raises SourceDenied (password, certificate), SourceUnavailable; so does any method, besides what it says.
    """

    def __init__(self, address: Address, check: Check = lambda: None, options: ExportOptions | None = None) -> None:
        self.options = options or ExportOptions()
        self._connection = Connection(address, check)

    def __enter__(self) -> VCenterSession:
        self._connection.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    @property
    def about(self) -> str:
        """Product and version: VMware vCenter Server 8.0.3 build-…"""
        return str(self._connection.content.about.fullName)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Calls within are made although the job was cancelled."""
        with self._connection.shielded():
            yield

    def examine(self) -> list[PreflightFinding]:
        """What a backup of any VM would meet: privileges, and the way to each host."""
        return preflight.of_server(self._connection)

    def leftovers(self) -> list[OldSnapshot]:
        """Every snapshot that jobs of ours have made and not removed yet, of those that run too."""
        return find_leftovers(self._connection)

    def remove(self, leftover: OldSnapshot, limit_s: float) -> None:
        """Remove a snapshot of ours; SourceUnavailable when it takes longer, though vSphere goes on with it."""
        snapshots.remove(self._connection, leftover.snapshot, limit_s)

    def find_vm(self, name: str) -> VM:
        """The VM by managed object id, instance UUID or inventory path; SourceNotFound says what was tried."""
        return VM(self._connection, self.options, inventory.find_vm(self._connection, name))

    def deploy(self, place: VmTarget, job_id: str) -> Import:
        """A VM to be made at that place, to be entered."""
        return Import(self._connection, place, job_id, self.options.lease_ready_s)


class VM:
    """A VM of a session."""

    def __init__(self, connection: Connection, options: ExportOptions, it: Any) -> None:
        self.moref: str = it._moId
        self.options = options
        self._connection = connection
        self._it = it

    def hardware(self) -> Hardware:
        """What the VM is made of now."""
        return inventory.read_hardware(inventory.config_of(self._connection, self._it))

    def examine(self, hardware: Hardware, own_snapshot: bool = True) -> list[PreflightFinding]:
        """What a backup of this VM would meet; nothing is touched."""
        return preflight.of_vm(self._connection, self._it, hardware, own_snapshot)

    def own_snapshot(self, job_id: str) -> Snapshot | None:
        """The snapshot that the job has made already."""
        return snapshots.find_own(self._connection, self._it, job_id)

    def given_snapshot(self, name: str) -> Snapshot:
        """The snapshot of that id or name; SourceNotFound, InvalidRequest."""
        return snapshots.find_given(self._connection, self._it, name)

    def make_snapshot(self, job_id: str) -> Snapshot:
        """Make the job's snapshot; see ``own_snapshot`` first. Quiesced if the guest can."""
        return snapshots.create(self._connection, self._it, job_id, self.options.quiesce)

    def remove_snapshot(self, snapshot: Snapshot, limit_s: float | None = None) -> None:
        """Remove it, if the job made it.

        SourceUnavailable when that takes longer than *limit_s*, or than remove_hours; vSphere goes on all the same.
        """
        snapshots.remove(self._connection, snapshot, limit_s or self.options.remove_hours * 3600)

    def consolidate(self, limit_s: float | None = None) -> None:
        """Join delta disks that the removal of a snapshot has left, if there are any; raises as ``remove_snapshot``."""
        snapshots.consolidate(self._connection, self._it, limit_s or self.options.remove_hours * 3600)

    def revive(self) -> None:
        """Log in again if the session has ended."""
        self._connection.revive()

    def host(self) -> str:
        """The id of the ESXi host that runs the VM now, unique in its vCenter; never fails for want of a privilege."""
        return inventory.host_of(self._connection, self._it)

    def read(self, snapshot: Snapshot) -> tuple[Hardware, bytes]:
        """What the VM was made of when the snapshot was taken, and all of its configuration as JSON."""
        config = inventory.config_of(self._connection, snapshots.object_of(self._connection, snapshot))
        return inventory.read_hardware(config), config_json(config)

    def changed_areas(self, snapshot: Snapshot, disk: Disk, change_id: str) -> list[Area]:
        """Offset and length of what changed block tracking says was written to a disk between then and the snapshot."""
        return changed_areas(self._it, snapshots.object_of(self._connection, snapshot), disk, change_id)

    def export(self, snapshot: Snapshot) -> Lease:
        """A lease, to be entered."""
        start = snapshots.object_of(self._connection, snapshot).ExportSnapshot
        return Lease(self._connection, start, snapshot.name, self.options.lease_ready_s)

    def descriptor(
        self, snapshot: Snapshot, hardware: Hardware, disks: Sequence[OvfDisk], beside: Sequence[OvfFile]
    ) -> tuple[bytes, str]:
        """The OVF descriptor of the stored disks: the server's, else our own with the reason for that."""
        text, why = server_descriptor(self._connection, self._it, snapshot, disks, beside)
        return (text.encode(), "") if text is not None else (build(hardware, disks, beside), why)
