"""Snapshots of ours, wherever in a vCenter they are: those of jobs that run, and those that dead jobs have left."""

from __future__ import annotations

from dataclasses import dataclass

from pyVmomi import vim

from .connection import Connection
from .faults import translated
from .snapshot import Snapshot, job_of, trees_of


@dataclass(frozen=True)
class OldSnapshot:
    """A snapshot that a backup job has made."""

    #: The VM's managed object id, and its name.
    vm: str
    vm_name: str
    job_id: str
    snapshot: Snapshot
    #: Seconds since the epoch.
    when: float


def find_leftovers(connection: Connection) -> list[OldSnapshot]:
    """Every snapshot that bears our name and our description, in the order of the VMs."""
    found = []
    with translated("Looking for snapshots of ours", connection.address.name):
        for vm, values in connection.each(vim.VirtualMachine, "name", "snapshot"):
            for tree in trees_of(values["snapshot"]):
                if job_id := job_of(tree):
                    snapshot = Snapshot(tree.snapshot._moId, tree.name, bool(tree.quiesced), ours=True)
                    found.append(OldSnapshot(vm._moId, values["name"], job_id, snapshot, tree.createTime.timestamp()))
    return found
