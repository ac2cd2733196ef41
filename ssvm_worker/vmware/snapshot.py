"""Snapshots: create, find and remove them, and list the areas of a disk that changed since an earlier one.

The name of a job's snapshot contains the job id. The worker removes only snapshots of jobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from pyVmomi import vim, vmodl

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.errors import InvalidRequest, ResourceBusy, SourceNotFound, SourceUnavailable

from .connection import Connection
from .faults import NOT_OF_THE_GUEST, fault_name, translated
from .hardware import Disk

#: Offset and length in bytes.
Area = tuple[int, int]

_PREFIX = "ssvm-backup-"
#: vSphere's limit for names of VMs; assumed to apply to snapshots too.
_MAX_NAME = 80
_DESCRIPTION = "Made for the backup job {}, which removes it when it is done."
#: Time-out in seconds. Quiescing a busy guest takes minutes; vSphere itself stops after 15.
_CREATE_S = 20 * 60.0
#: The remark on a snapshot of a VM that is off: its file systems need no quiescing.
IS_OFF = "the VM is off"
#: The beginning of the remark on a snapshot whose quiescing vSphere has ignored.
SILENT = "vSphere did not quiesce the guest"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of a VM."""

    moref: str
    name: str
    #: Whether vSphere reports that it quiesced the guest's file systems.
    quiesced: bool
    #: Whether a job of this worker made the snapshot and may remove it.
    ours: bool
    #: The reason for a snapshot without quiescing.
    remark: str = ""
    #: Seconds since the epoch.
    created: float = 0.0


def own_name(job_id: str) -> str:
    """Return the name of a job's snapshot. A hash replaces a job id that is too long."""
    name = f"{_PREFIX}{job_id}"
    return name if len(name) <= _MAX_NAME else f"{_PREFIX}{digest_of(job_id.encode()).hex[:32]}"


def _is_named(tree: Any, name: str) -> bool:
    """Return whether a snapshot has a name. vSphere may escape ``%``, ``/`` and the backslash in names: ``%25``."""
    return name in (tree.name, unquote(tree.name))


def job_of(tree: Any) -> str:
    """Return the id of the job that made a snapshot. It is empty unless name and description are those of a job."""
    before, _, after = _DESCRIPTION.partition("{}")
    text = tree.description or ""
    job_id = text.removeprefix(before).removesuffix(after)
    return job_id if text == _DESCRIPTION.format(job_id) and _is_named(tree, own_name(job_id)) else ""


def find_own(connection: Connection, vm: Any, job_id: str) -> Snapshot | None:
    """Return the snapshot that an earlier attempt of the job made, or None."""
    name = own_name(job_id)
    with translated("Searching for snapshots", vm._moId):
        trees = trees_of(connection.read(vm, "snapshot")["snapshot"])
        tree = next((each for each in trees if _is_named(each, name)), None)
    return _snapshot(tree, ours=True) if tree else None


def find_given(connection: Connection, vm: Any, wanted: str) -> Snapshot:
    """Return the VM's snapshot with that id or name.

    Raises SourceNotFound with a list of the snapshots, and InvalidRequest if several match.
    """
    with translated("Searching for the snapshot", wanted):
        trees = list(trees_of(connection.read(vm, "snapshot")["snapshot"]))
    found = [each for each in trees if wanted == each.snapshot._moId or _is_named(each, wanted)]
    if len(found) == 1:
        return _snapshot(found[0], ours=False)
    listed = ", ".join(f"{each.snapshot._moId} = {each.name}" for each in trees) or "none"
    if found:
        raise InvalidRequest(f"Several snapshots are named {wanted!r}", vm._moId, f"Give the id: {listed}")
    raise SourceNotFound(f"The VM has no snapshot {wanted!r}", vm._moId, f"There are: {listed}")


def create(connection: Connection, vm: Any, job_id: str, quiesce: str) -> Snapshot:
    """Make the job's snapshot, without memory.

    *quiesce* is ``no``, ``if_possible`` or ``required``. With ``if_possible``, any fault that can come from the guest
    leads to a crash-consistent snapshot with a remark. Real guests answer with many different faults.
    With ``required``, raises SourceUnavailable if the guest was not quiesced, and leaves no snapshot.
    """
    with translated("Making the snapshot", vm._moId):
        if quiesce == "no":
            return _snapshot(_make(connection, vm, job_id, None), ours=True, remark="not asked for")
        try:
            snapshot = _snapshot(_make(connection, vm, job_id, vim.vm.GuestQuiesceSpec()), ours=True)
        except vmodl.MethodFault as error:
            if quiesce == "required" or isinstance(error, NOT_OF_THE_GUEST):
                raise
            return _snapshot(_make(connection, vm, job_id, None), ours=True, remark=fault_name(error))
        if snapshot.quiesced:
            return snapshot
        # vSphere may ignore the request silently: without running tools, and where VSS has failed.
        power, tools = connection.read(vm, "runtime.powerState", "guest.toolsRunningStatus").values()
    if str(power) == "poweredOff":
        return replace(snapshot, remark=IS_OFF)
    remark = f"{SILENT} (tools: {tools}, power: {power})"
    if quiesce == "required":
        remove(connection, snapshot, _CREATE_S)
        raise SourceUnavailable(remark, vm._moId, "Check the guest's tools, or set backup.quiesce to if_possible")
    return replace(snapshot, remark=remark)


def remove(connection: Connection, snapshot: Snapshot, limit_s: float) -> None:
    """Remove a job's snapshot, but not its children, and wait for the end. A missing snapshot is no error.

    Raises SourceUnavailable after *limit_s*. vSphere then continues the removal.
    """
    if not snapshot.ours:
        return
    entity = object_of(connection, snapshot)
    with translated("Removing the snapshot", snapshot.name):
        try:
            connection.finish(entity.RemoveSnapshot_Task(removeChildren=False), limit_s)
        except vmodl.fault.ManagedObjectNotFound:
            return


def consolidate(connection: Connection, vm: Any, limit_s: float) -> None:
    """Consolidate the delta disks of removed snapshots, if vSphere reports that this is necessary.

    Raises ResourceBusy if it is still necessary afterwards: another program may have a disk open.
    """
    with translated("Consolidating the disks", vm._moId):
        if not needs_consolidation(connection, vm):
            return
        connection.finish(vm.ConsolidateVMDisks_Task(), limit_s)
        if needs_consolidation(connection, vm):
            what = "The disks still need consolidation, although vSphere has consolidated them"
            raise ResourceBusy(what, vm._moId, "Check in vCenter if another backup program has attached a disk")


def needs_consolidation(connection: Connection, vm: Any) -> bool:
    """Return whether a removed snapshot has left delta disks, which grow with each write of the VM."""
    return bool(connection.read(vm, "runtime.consolidationNeeded")["runtime.consolidationNeeded"])


def object_of(connection: Connection, snapshot: Snapshot) -> Any:
    """Return the managed object of a snapshot."""
    return connection.object(vim.vm.Snapshot, snapshot.moref)


def _make(connection: Connection, vm: Any, job_id: str, quiesce: Any) -> Any:
    name = own_name(job_id)
    task = vm.CreateSnapshotEx_Task(
        name=name, description=_DESCRIPTION.format(job_id), memory=False, quiesceSpec=quiesce
    )
    made = connection.finish(task, _CREATE_S)
    trees = trees_of(connection.read(vm, "snapshot")["snapshot"])
    if (tree := next((each for each in trees if each.snapshot == made), None)) is None:
        raise vmodl.fault.ManagedObjectNotFound(obj=made)  # a user or program has already removed it
    return tree


def trees_of(info: Any) -> Iterator[Any]:
    """Yield every snapshot in a VM's ``snapshot`` property, which may be None."""
    pending = list(info.rootSnapshotList) if info else []
    while pending:
        tree = pending.pop(0)
        yield tree
        pending += tree.childSnapshotList


def _snapshot(tree: Any, ours: bool, remark: str = "") -> Snapshot:
    return Snapshot(tree.snapshot._moId, tree.name, bool(tree.quiesced), ours, remark, tree.createTime.timestamp())


@dataclass(frozen=True)
class OldSnapshot:
    """A snapshot that a backup job has made."""

    #: The VM's managed object id.
    vm: str
    vm_name: str
    job_id: str
    snapshot: Snapshot
    #: Seconds since the epoch.
    created: float


def find_old_snapshots(connection: Connection) -> list[OldSnapshot]:
    """Return every snapshot with the name and the description of a backup job, in the order of the VMs."""
    found = []
    with translated("Searching for snapshots of backup jobs", connection.address.name):
        for vm, values in connection.each(vim.VirtualMachine, "name", "snapshot"):
            for tree in trees_of(values["snapshot"]):
                if job_id := job_of(tree):
                    snapshot = Snapshot(tree.snapshot._moId, tree.name, bool(tree.quiesced), ours=True)
                    found.append(OldSnapshot(vm._moId, values["name"], job_id, snapshot, tree.createTime.timestamp()))
    return found


def changed_areas(vm: Any, snapshot: Any, disk: Disk, change_id: str) -> list[Area]:
    """Return the areas of a snapshot's disk that were written since *change_id*, sorted by offset.

    This is changed block tracking (CBT). The worker compares the report with the data and never relies on it. Known
    defects that lose changes: KB 2090639 (a disk that grew beyond 128 GB) and KB 2136854 (vSphere 6.0, during
    consolidation).

    *vm* and *snapshot* are pyVmomi objects. One answer may cover only a part of the disk.
    This function therefore repeats the query up to the end of the disk.
    Raises SourceUnavailable, or another WorkerError, if the server has no answer.
    """
    areas: list[Area] = []
    with translated("Querying changed blocks", vm._moId):
        offset = 0
        while offset < disk.capacity:
            answer = vm.QueryChangedDiskAreas(snapshot, disk.key, offset, change_id)
            areas += [(each.start, each.length) for each in answer.changedArea]
            end = answer.startOffset + answer.length
            if end <= offset:
                raise SourceUnavailable(f"vCenter reports no changed blocks from byte {offset} on", vm._moId)
            offset = end
    return sorted(areas)
