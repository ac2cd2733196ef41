"""A new VM from an OVF descriptor. vCenter creates the VM, and the worker sends its disks through a lease.

If the import fails, the worker removes the VM.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from pyVmomi import vim

from ssvm_worker.errors import InvalidRequest, LeaseLost, SourceDenied, WorkerError

from .connection import Connection
from .export import ExportLink
from .faults import fault_name, translated
from .lease import Lease, LeaseFile
from .ovf import networks_of
from .placement import FoundObjects, VmTarget, find_objects, find_vm_in
from .preflight import ERROR, WARNING, examine_target
from .upload import HostSink

#: Key in the extra configuration of a restored VM. Its value is the job id.
#: It identifies the VM that an earlier attempt of the job left behind.
_JOB_ID_KEY = "ssvm.restore.job"
#: Time-out in seconds for the removal of a VM with little data.
_DESTROY_S = 300.0


@dataclass(frozen=True)
class ImportFile:
    """A file that the new VM needs."""

    #: The name in the backup.
    name: str
    #: The key of the file in the lease.
    key: str
    #: Whether the upload creates the file.
    create: bool


class Import:
    """The import of a VM, as a context manager. On exit, it removes the VM unless the import was completed."""

    def __init__(self, connection: Connection, target: VmTarget, job_id: str, ready_s: float) -> None:
        #: Warnings from vCenter about the descriptor.
        self.warnings: list[str] = []
        #: The files that the new VM needs.
        self.files: tuple[ImportFile, ...] = ()
        self._connection = connection
        self._target = target
        self._job_id = job_id
        self._ready_s = ready_s
        self._found: FoundObjects | None = None
        self._lease: Lease | None = None
        self._spec: Any = None
        self._started = self._completed = False

    @property
    def name(self) -> str:
        """Return the name of the new VM."""
        return self._target.name

    def prepare(self, descriptor: str) -> None:
        """Find the target and let vCenter check the descriptor. This method creates no VM.

        It removes the VM that an earlier attempt of this job left behind.
        Raises InvalidRequest for an unknown target, a name that is in use, or a descriptor that vCenter rejects.
        Raises SourceDenied with every missing privilege.
        """
        self._found = find_objects(self._connection, self._target, networks_of(descriptor))
        self.warnings = self._check_privileges(self._found)
        if not self._remove_own() and find_vm_in(self._connection, self._found.folder, self.name):
            raise InvalidRequest(
                f"A VM named {self.name!r} already exists", self._connection.address.name, "Give another name"
            )
        networks = self._found.networks.items()
        params = vim.OvfManager.CreateImportSpecParams(
            locale="",
            deploymentOption="",
            entityName=self.name,
            diskProvisioning="thin",
            hostSystem=self._found.host,
            networkMapping=[vim.OvfManager.NetworkMapping(name=name, network=network) for name, network in networks],
        )
        with translated("Checking the OVF descriptor", self.name):
            manager = self._connection.content.ovfManager
            result = manager.CreateImportSpec(descriptor, self._found.pool, self._found.datastore, params)
        self.warnings += [_message(each) for each in result.warning or ()]
        if result.error or result.importSpec is None:
            reasons = "; ".join(_message(each) for each in result.error or ()) or "it gives no reason"
            raise InvalidRequest(f"vCenter rejects the VM: {reasons}", self.name, "Check the OVF in the backup")
        mark = vim.option.OptionValue(key=_JOB_ID_KEY, value=self._job_id)
        result.importSpec.configSpec.extraConfig.append(mark)
        self._spec = result.importSpec
        self.files = tuple(
            ImportFile(unquote(each.path), each.deviceId, bool(each.create)) for each in result.fileItem or ()
        )

    def _check_privileges(self, found: FoundObjects) -> list[str]:
        """Return warnings. Raise SourceDenied if the user lacks privileges for the target."""
        findings = examine_target(self._connection, found)
        errors = [each for each in findings if each.state == ERROR]
        if errors:
            what = "Nothing was touched: " + "; ".join(each.detail for each in errors)
            raise SourceDenied(what, self.name, ". ".join(each.remedy for each in errors))
        return [f"{each.check}: {each.detail}" for each in findings if each.state == WARNING]

    def open(self) -> Lease:
        """Create the VM and wait until the host can receive its disks. Raises the same errors as Lease."""
        assert self._found is not None
        pool, folder, host = self._found.pool, self._found.folder, self._found.host
        lease = Lease(self._connection, lambda: pool.ImportVApp(self._spec, folder, host), self.name, self._ready_s)
        self._started = True
        self._lease = lease.__enter__()
        return lease

    def sink(self, file: ImportFile, size: int) -> HostSink:
        """Return the sink for the *size* bytes of a file."""
        assert self._lease is not None
        offered = self.file_of(file)
        link = ExportLink(offered.url, offered.thumbprint, self._connection.address, self._connection.cookie)
        return HostSink(link, size, self._lease.check, create=file.create)

    def file_of(self, file: ImportFile) -> LeaseFile:
        """Return the lease's entry for a file. Raises LeaseLost if the lease has none."""
        offered = self._lease.files if self._lease else ()
        found = next((each for each in offered if each.import_key == file.key), None)
        if found is None:
            keys = ", ".join(each.import_key for each in offered) or "none"
            raise LeaseLost(
                f"The lease has no URL for {file.name} ({file.key})", self.name, f"Keys of the lease: {keys}"
            )
        return found

    def complete(self) -> None:
        """Keep the VM. Raises LeaseLost if vSphere has ended the lease."""
        assert self._lease is not None
        self._lease.finish()
        self._completed = True

    def __enter__(self) -> Import:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._completed or not self._started:
            return
        with self._connection.shielded():
            if self._lease is not None:
                self._lease.__exit__(*exc)
            # vSphere removes the VM of an aborted lease. If this cannot be verified now, the next attempt removes it.
            with contextlib.suppress(WorkerError):
                self._remove_own()

    def remove_leftover(self) -> bool:
        """Remove the VM that an earlier attempt of this job left behind. Return whether there was one."""
        self._found = find_objects(self._connection, self._target, list(self._target.networks))
        return self._remove_own()

    def _remove_own(self) -> bool:
        """Remove the VM that this job has created, unless the VM is powered on. Return whether it was removed."""
        assert self._found is not None
        vm = find_vm_in(self._connection, self._found.folder, self.name)
        if vm is None:
            return False
        with translated("Reading the VM", self.name):
            values = self._connection.read(vm, "config.extraConfig", "runtime.powerState")
        options = {each.key: each.value for each in values["config.extraConfig"] or ()}
        if options.get(_JOB_ID_KEY) != self._job_id or str(values["runtime.powerState"]) != "poweredOff":
            return False
        with translated("Removing an unfinished VM", self.name):
            self._connection.finish(vm.Destroy_Task(), _DESTROY_S)
        return True


def _message(fault: Any) -> str:
    """Return vCenter's text for a fault, or the name of the fault. pyVmomi unwraps a LocalizedMethodFault."""
    return str(fault.msg or fault_name(fault))
