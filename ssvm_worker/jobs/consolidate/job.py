"""Remove the snapshot that an ended backup job could not remove, and consolidate the VM's disks.

A worker queues this job at the end of such a backup. It retries for a week, first within a minute and later each hour:
a snapshot grows with each write of its VM.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ssvm_worker.errors import SourceNotFound
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup.snapshot_removal import forget_snapshot, remove_snapshot
from ssvm_worker.jobs.request import ArtifactRequest


class Request(ArtifactRequest):
    """The backup, the job that made it, and the VM."""

    kind: Literal["backup"] = Field("backup", description="The kind of the artifact")
    volume: str = Field(min_length=1, description="The volume or VM of the backup")
    vcenter: str = Field(description="The vCenter's name in the settings")
    vm: str = Field(min_length=1, description="Managed object id, instance UUID or inventory path")
    backup: str = Field(min_length=1, description="The id of the backup job that made the snapshot")
    patient: bool = Field(False, description="Retry for a week while the VM is busy or vCenter is unreachable")


def resource(request: Request) -> str:
    """Return the lock's name: no backup of the volume runs meanwhile, which could be another attempt of that job."""
    return request.artifact.resource


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Remove the snapshot, if it still exists, and consolidate the disks, if necessary.

    Raises ResourceBusy, SourceUnavailable and SourceDenied.
    """
    attempt.progress.start("removing the snapshot")
    removed = False
    try:
        with attempt.services.connections.vcenter(request.vcenter, attempt.check) as session:
            removed = remove_snapshot(attempt, session.find_vm(request.vm), request.vcenter, request.backup)
    except SourceNotFound:  # the VM was deleted, and its snapshots with it
        forget_snapshot(attempt, request.backup)
    return {"vm": request.vm, "removed": removed}


def discard(request: Request, attempt: Attempt) -> None:
    """Do nothing: this job writes no artifact."""
