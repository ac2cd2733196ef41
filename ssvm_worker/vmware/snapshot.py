"""Snapshots: ours are named by the job, found again by that name, and the only ones that are ever removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.errors import InvalidRequest, SourceNotFound

from .connection import Connection
from .faults import UNSUPPORTED, fault_name, translated

_PREFIX = "ssvm-backup-"
#: vSphere's limit for the names of VMs; taken to hold for snapshots too.
_MAX_NAME = 80
_DESCRIPTION = "Made for the backup job {}, which removes it when it is done."
#: Quiescing a busy guest takes minutes; vSphere itself gives up after 15.
_CREATE_S = 20 * 60.0
#: What a guest that cannot be quiesced answers.
_NOT_QUIESCED = (vim.fault.SnapshotFault, vim.fault.ToolsUnavailable, vmodl.fault.NotSupported)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of a VM."""

    moref: str
    name: str
    #: Whether the guest's file systems were at rest, as vSphere says.
    quiesced: bool
    #: Whether this job made it, and so may remove it.
    ours: bool
    #: Why it was not quiesced though that was tried.
    remark: str = ""


def own_name(job_id: str) -> str:
    """What the snapshot of a job is called."""
    name = f"{_PREFIX}{job_id}"
    return name if len(name) <= _MAX_NAME else f"{_PREFIX}{digest_of(job_id.encode()).hex[:32]}"


def job_of(tree: Any) -> str:
    """The job that has made a snapshot, by its description; empty if it is none of ours, by name or description."""
    before, _, after = _DESCRIPTION.partition("{}")
    text = tree.description or ""
    job_id = text.removeprefix(before).removesuffix(after)
    return job_id if text == _DESCRIPTION.format(job_id) and tree.name == own_name(job_id) else ""


def find_own(connection: Connection, vm: Any, job_id: str) -> Snapshot | None:
    """The snapshot that an earlier attempt of the job has left."""
    name = own_name(job_id)
    with translated("Looking for snapshots", vm._moId):
        tree = next((each for each in _trees(connection, vm) if each.name == name), None)
    return _plain(tree, ours=True) if tree else None


def find_given(connection: Connection, vm: Any, wanted: str) -> Snapshot:
    """The VM's snapshot of that id or name; SourceNotFound lists those there are, InvalidRequest if several match."""
    with translated("Looking for the snapshot", wanted):
        trees = list(_trees(connection, vm))
    found = [each for each in trees if wanted in (each.snapshot._moId, each.name)]
    if len(found) == 1:
        return _plain(found[0], ours=False)
    listed = ", ".join(f"{each.snapshot._moId} = {each.name}" for each in trees) or "none"
    if found:
        raise InvalidRequest(f"Several snapshots are named {wanted!r}", vm._moId, f"Give the id: {listed}")
    raise SourceNotFound(f"The VM has no snapshot {wanted!r}", vm._moId, f"There are: {listed}")


def create(connection: Connection, vm: Any, job_id: str, quiesce: bool) -> Snapshot:
    """Make the job's snapshot, without memory; quiesced if that is wanted and the guest can, else crash-consistent."""
    with translated("Making the snapshot", vm._moId):
        if not quiesce:
            return _plain(_make(connection, vm, job_id, None), ours=True, remark="not asked for")
        try:
            return _plain(_make(connection, vm, job_id, vim.vm.GuestQuiesceSpec()), ours=True)
        except (*_NOT_QUIESCED, *UNSUPPORTED) as error:
            return _plain(_make(connection, vm, job_id, None), ours=True, remark=fault_name(error))


def remove(connection: Connection, snapshot: Snapshot, limit_s: float) -> None:
    """Remove a snapshot of ours, alone, and wait for it; one that is gone already is fine.

    Raises SourceUnavailable when it takes longer than *limit_s*; vSphere goes on with it all the same.
    """
    if not snapshot.ours:
        return
    it = object_of(connection, snapshot)
    with translated("Removing the snapshot", snapshot.name):
        try:
            connection.finish(it.RemoveSnapshot_Task(removeChildren=False), limit_s)
        except vmodl.fault.ManagedObjectNotFound:
            return


def consolidate(connection: Connection, vm: Any, limit_s: float) -> None:
    """Join delta disks that the removal of a snapshot has left, where vSphere says that there are any."""
    with translated("Consolidating the disks", vm._moId):
        if connection.read(vm, "runtime.consolidationNeeded")["runtime.consolidationNeeded"]:
            connection.finish(vm.ConsolidateVMDisks_Task(), limit_s)


def object_of(connection: Connection, snapshot: Snapshot) -> Any:
    """The managed object."""
    return connection.object(vim.vm.Snapshot, snapshot.moref)


def _make(connection: Connection, vm: Any, job_id: str, quiesce: Any) -> Any:
    name = own_name(job_id)
    task = vm.CreateSnapshotEx_Task(
        name=name, description=_DESCRIPTION.format(job_id), memory=False, quiesceSpec=quiesce
    )
    made = connection.finish(task, _CREATE_S)
    return next(each for each in _trees(connection, vm) if each.snapshot == made)


def _trees(connection: Connection, vm: Any) -> Iterator[Any]:
    yield from trees_of(connection.read(vm, "snapshot")["snapshot"])


def trees_of(info: Any) -> Iterator[Any]:
    """Every snapshot of a VM's ``snapshot`` property, which may be None."""
    pending = list(info.rootSnapshotList) if info else []
    while pending:
        tree = pending.pop(0)
        yield tree
        pending += tree.childSnapshotList


def _plain(tree: Any, ours: bool, remark: str = "") -> Snapshot:
    return Snapshot(tree.snapshot._moId, tree.name, bool(tree.quiesced), ours, remark)
