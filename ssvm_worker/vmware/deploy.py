"""A new VM from an OVF descriptor: vCenter makes it, a lease takes its disks; where that is aborted, the VM goes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from pyVmomi import vim

from ssvm_worker.errors import InvalidRequest, LeaseLost, WorkerError

from .connection import Connection
from .export import ExportLink
from .faults import fault_name, translated
from .lease import Lease, LeaseFile
from .ovf import networks_of
from .place import VmTarget
from .placement import FoundObjects, find_place, find_vm_in
from .upload import HostSink

#: In the extra configuration of a VM that we make: the job, so that what a dead attempt has left can be told.
_MARK = "ssvm.restore.job"
#: Seconds in which a VM without much in it is destroyed.
_DESTROY_S = 300.0


@dataclass(frozen=True)
class ImportFile:
    """A file that the new VM needs."""

    #: As the backup calls it.
    name: str
    #: By which the lease will call its place.
    key: str
    #: Whether the upload makes the file.
    create: bool


class Import:
    """A VM to be made. A context manager: leaving it removes the VM, unless it was completed."""

    def __init__(self, connection: Connection, place: VmTarget, job_id: str, ready_s: float) -> None:
        #: What vCenter finds remarkable; none of it is an error.
        self.warnings: list[str] = []
        self.wanted: tuple[ImportFile, ...] = ()
        self._connection = connection
        self._place = place
        self._job_id = job_id
        self._ready_s = ready_s
        self._found: FoundObjects | None = None
        self._lease: Lease | None = None
        self._spec: Any = None
        self._begun = self._completed = False

    @property
    def name(self) -> str:
        """What the VM will be called."""
        return self._place.name

    def prepare(self, descriptor: str) -> None:
        """Find the place, and have vCenter judge the descriptor; nothing is made.

        Raises InvalidRequest for a place that is not there, a name that is taken, a descriptor that vCenter refuses.
        """
        self._found = find_place(self._connection, self._place, networks_of(descriptor))
        self._make_way()
        mapping = [vim.OvfManager.NetworkMapping(name=name, network=it) for name, it in self._found.networks.items()]
        params = vim.OvfManager.CreateImportSpecParams(
            locale="",
            deploymentOption="",
            entityName=self._place.name,
            diskProvisioning="thin",
            networkMapping=mapping,
        )
        with translated("Judging the OVF descriptor", self._place.name):
            manager = self._connection.content.ovfManager
            it = manager.CreateImportSpec(descriptor, self._found.pool, self._found.datastore, params)
        self.warnings = [_said(each) for each in it.warning or ()]
        if it.error or it.importSpec is None:
            said = "; ".join(_said(each) for each in it.error or ()) or "it gives no reason"
            raise InvalidRequest(f"vCenter does not take the VM: {said}", self._place.name, "Look at the backup's OVF")
        it.importSpec.configSpec.extraConfig.append(vim.option.OptionValue(key=_MARK, value=self._job_id))
        self._spec = it.importSpec
        self.wanted = tuple(
            ImportFile(unquote(each.path), each.deviceId, bool(each.create)) for each in it.fileItem or ()
        )

    def open(self) -> Lease:
        """Make the VM and wait until its disks can be sent; see Lease for what is raised."""
        assert self._found is not None
        pool, folder = self._found.pool, self._found.folder
        lease = Lease(
            self._connection, lambda: pool.ImportVApp(self._spec, folder, None), self._place.name, self._ready_s
        )
        self._begun = True
        self._lease = lease.__enter__()
        return lease

    def sink(self, wanted: ImportFile, size: int) -> HostSink:
        """Where the *size* bytes of a file go."""
        assert self._lease is not None
        file = self.file_of(wanted)
        link = ExportLink(file.url, file.thumbprint, self._connection.address, self._connection.cookie)
        return HostSink(link, size, self._lease.check, create=wanted.create)

    def file_of(self, wanted: ImportFile) -> LeaseFile:
        """The lease's file of that place; LeaseLost where it has none."""
        files = self._lease.files if self._lease else ()
        found = next((each for each in files if each.import_key == wanted.key), None)
        if found is None:
            what = f"The lease has no place for {wanted.name} ({wanted.key})"
            raise LeaseLost(what, self._place.name, f"It has: {', '.join(each.import_key for each in files) or 'none'}")
        return found

    def complete(self) -> None:
        """Make the VM stay. Raises LeaseLost if vSphere has given it up."""
        assert self._lease is not None
        self._lease.finish()
        self._completed = True

    def __enter__(self) -> Import:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._completed or not self._begun:
            return
        with self._connection.shielded():
            if self._lease is not None:
                self._lease.__exit__(*exc)
            # vSphere removes what an aborted lease has made; what cannot be made sure of now is the retry's affair.
            with contextlib.suppress(WorkerError):
                self._remove_own()

    def remove_leftover(self) -> bool:
        """Whether there was a VM of this job at its place, which is gone now."""
        self._found = find_place(self._connection, self._place, list(self._place.networks))
        return self._remove_own()

    def _make_way(self) -> None:
        """Remove what a dead attempt of this job has left; anything else of that name is refused."""
        assert self._found is not None
        if not self._remove_own() and find_vm_in(self._connection, self._found.folder, self._place.name):
            raise InvalidRequest(
                f"There is a VM named {self._place.name!r} already", self._connection.address.name, "Give another name"
            )

    def _remove_own(self) -> bool:
        assert self._found is not None
        vm = find_vm_in(self._connection, self._found.folder, self._place.name)
        if vm is None or not self._is_ours(vm):
            return False
        with translated("Removing an unfinished VM", self._place.name):
            self._connection.finish(vm.Destroy_Task(), _DESTROY_S)
        return True

    def _is_ours(self, vm: Any) -> bool:
        """Whether this job has made it, and nobody has begun to use it."""
        with translated("Looking at the VM", self._place.name):
            seen = self._connection.read(vm, "config.extraConfig", "runtime.powerState")
        marks = {each.key: each.value for each in seen["config.extraConfig"] or ()}
        return marks.get(_MARK) == self._job_id and str(seen["runtime.powerState"]) == "poweredOff"


def _said(fault: Any) -> str:
    """A fault as vCenter words it."""
    return str(fault.localizedMessage or fault_name(fault.fault))
