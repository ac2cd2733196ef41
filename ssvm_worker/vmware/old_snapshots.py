"""The search for snapshots that backup jobs have made, in the whole vCenter: of running jobs and of ended ones."""

from __future__ import annotations

from dataclasses import dataclass

from pyVmomi import vim

from .connection import Connection
from .faults import translated
from .snapshot import Snapshot, job_of, trees_of


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
