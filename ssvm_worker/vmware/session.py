"""A session with a vCenter or ESXi host, with the operations that backup and restore need, in plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pyVmomi import vim

from ssvm_worker.config.schema import BackupSection
from ssvm_worker.errors import SourceUnavailable
from ssvm_worker.streaming.interfaces import Check

from . import inventory, preflight
from . import snapshot as snapshots
from .connection import Connection
from .deploy import Import
from .descriptor import config_json, server_descriptor
from .hardware import Disk, Hardware
from .lease import Lease
from .ovf import OvfDisk, OvfFile, build
from .placement import VmTarget, find_objects
from .preflight import PreflightFinding
from .snapshot import Area, OldSnapshot, Snapshot, changed_areas, find_old_snapshots
from .trial import Trial, TrialReport
from .trust import Address

__all__ = ["VM", "Address", "VCenterSession"]


class VCenterSession:
    """A login as a context manager. Enter it in the process and thread that use it.

    Entering, and every method, raises SourceDenied (password, certificate) and SourceUnavailable.
    The docstrings of the methods list only further errors.
    """

    def __init__(self, address: Address, check: Check = lambda: None, options: BackupSection | None = None) -> None:
        self.options = options or BackupSection()
        self._connection = Connection(address, check)

    def __enter__(self) -> VCenterSession:
        self._connection.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    @property
    def about(self) -> str:
        """Return product and version, such as VMware vCenter Server 8.0.3 build-24022515."""
        return str(self._connection.content.about.fullName)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Ignore cancellation in this thread while the block runs."""
        with self._connection.shielded():
            yield

    def examine(self) -> list[PreflightFinding]:
        """Check privileges, the connection to each host and old snapshots, for a backup of any VM."""
        return preflight.examine_server(self._connection)

    def examine_target(self, target: VmTarget) -> list[PreflightFinding]:
        """Check the privileges and hosts of a restore. Each network of the target is checked under its own name.

        Raises InvalidRequest for an unknown or ambiguous name.
        """
        found = find_objects(self._connection, target, list(target.networks))
        return preflight.examine_target(self._connection, found) + preflight.examine_hosts(self._connection, found)

    def leftovers(self) -> list[OldSnapshot]:
        """Return every snapshot that a backup job has made, also of running jobs."""
        return find_old_snapshots(self._connection)

    def find_vm(self, name: str) -> VM:
        """Return the VM with that managed object id, instance UUID or inventory path. Raises SourceNotFound."""
        return VM(self._connection, self.options, inventory.find_vm(self._connection, name))

    def deploy(self, target: VmTarget, job_id: str) -> Import:
        """Return the import of a new VM, a context manager."""
        return Import(self._connection, target, job_id, self.options.lease_ready_s)


class VM:
    """A VM of a session."""

    def __init__(self, connection: Connection, options: BackupSection, vm: Any) -> None:
        self.moref: str = vm._moId
        self.options = options
        self._connection = connection
        self._vm = vm

    def hardware(self) -> Hardware:
        """Return the VM's present hardware."""
        return self._hardware(inventory.config_of(self._connection, self._vm))

    def _hardware(self, config: Any) -> Hardware:
        return inventory.read_hardware(config, inventory.network_names(self._connection, config))

    def examine(
        self, hardware: Hardware, own_snapshot: bool = True, *, try_encrypted: bool = False
    ) -> list[PreflightFinding]:
        """Check this VM before a backup. This method changes nothing."""
        return preflight.examine_vm(self._connection, self._vm, hardware, own_snapshot, try_encrypted=try_encrypted)

    def own_snapshot(self, job_id: str) -> Snapshot | None:
        """Return the snapshot that the job has already made, or None."""
        return snapshots.find_own(self._connection, self._vm, job_id)

    def given_snapshot(self, name: str) -> Snapshot:
        """Return the snapshot with that id or name. Raises SourceNotFound and InvalidRequest."""
        return snapshots.find_given(self._connection, self._vm, name)

    def make_snapshot(self, job_id: str, quiesce: str = "if_possible") -> Snapshot:
        """Make the job's snapshot. *quiesce* has the values of ``backup.quiesce``. Call ``own_snapshot`` first."""
        return snapshots.create(self._connection, self._vm, job_id, quiesce)

    def remove_snapshot(self, snapshot: Snapshot, limit_s: float | None = None) -> None:
        """Remove a snapshot that a job has made; ignore other snapshots.

        Raises SourceUnavailable after *limit_s*, by default remove_hours. vSphere then continues the removal.
        """
        snapshots.remove(self._connection, snapshot, limit_s or self.options.remove_hours * 3600)

    def trial(self, job_id: str, tell: Callable[[str], None], pause_s: float = 5.0, disk: bytes = b"") -> TrialReport:
        """Ask what only this vCenter knows. The VM must be a scratch VM. See ``Trial``."""
        return Trial(self._connection, self._vm, job_id, pause_s, disk).run(tell)

    def consolidate(self, limit_s: float | None = None) -> None:
        """Consolidate the delta disks of removed snapshots, if necessary. Raises as ``remove_snapshot``."""
        snapshots.consolidate(self._connection, self._vm, limit_s or self.options.remove_hours * 3600)

    def revive(self) -> None:
        """Log in again if the session has ended."""
        self._connection.revive()

    def host(self) -> str:
        """Return an id of the VM's present ESXi host. Log in again if the session has ended.

        A missing privilege is no error.
        """
        try:
            return inventory.host_of(self._connection, self._vm)
        except SourceUnavailable as error:
            if not isinstance(error.__cause__, vim.fault.NotAuthenticated):
                raise
        self.revive()
        return inventory.host_of(self._connection, self._vm)

    def is_on(self) -> bool:
        """Return whether the VM is powered on."""
        return inventory.is_on(self._connection, self._vm)

    def datastores(self) -> list[inventory.DatastoreSpace]:
        """Return the present space of the VM's datastores."""
        return inventory.datastores_of(self._connection, self._vm)

    def read(self, snapshot: Snapshot) -> tuple[Hardware, bytes]:
        """Return the VM's hardware in a snapshot, and its complete configuration as JSON."""
        config = inventory.config_of(self._connection, snapshots.object_of(self._connection, snapshot))
        return self._hardware(config), config_json(config)

    def changed_areas(self, snapshot: Snapshot, disk: Disk, change_id: str) -> list[Area]:
        """Return the areas of a disk that vSphere reports as written between *change_id* and the snapshot."""
        return changed_areas(self._vm, snapshots.object_of(self._connection, snapshot), disk, change_id)

    def export(self, snapshot: Snapshot) -> Lease:
        """Return a lease on a snapshot, a context manager."""
        start = snapshots.object_of(self._connection, snapshot).ExportSnapshot
        return Lease(self._connection, start, snapshot.name, self.options.lease_ready_s)

    def descriptor(
        self, snapshot: Snapshot, hardware: Hardware, disks: Sequence[OvfDisk], other_files: Sequence[OvfFile]
    ) -> tuple[bytes, str]:
        """Return the server's OVF descriptor of the stored disks and "", or the worker's own and the reason."""
        text, reason = server_descriptor(self._connection, self._vm, snapshot, disks, other_files)
        return (text.encode(), "") if text is not None else (build(hardware, disks, other_files), reason)
