"""The removal of a backup job's snapshot, and the record of the snapshots that still exist."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssvm_worker.errors import InvalidRequest, ResourceBusy, SourceNotFound, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.ledger.open_snapshots import OpenSnapshot

if TYPE_CHECKING:
    from ssvm_worker.vmware.session import VM
    from ssvm_worker.vmware.snapshot import Snapshot

#: Seconds that a failed or cancelled job waits for the removal of its snapshot. vSphere then continues the removal.
CLEAN_UP_S = 60.0
#: Waits between tries to remove the snapshot of a busy VM, as multiples of ``lease_delay_s``: 8 minutes by default.
BUSY_DELAYS = (1, 1, 2, 4, 8, 16)
#: The same for a failed or cancelled job: one minute.
_CLEAN_UP_DELAYS = (1, 1, 2)


def note_snapshot(attempt: Attempt, vcenter: str, vm: VM, snapshot: Snapshot) -> None:
    """Record that the job has a snapshot."""
    _note(attempt, OpenSnapshot(attempt.job_id, vcenter, vm.moref, snapshot.created))


def forget_snapshot(attempt: Attempt, job_id: str) -> None:
    """Record that the snapshot of a job is gone."""
    try:
        attempt.services.open_snapshots.forget(job_id)
    except WorkerError as error:
        attempt.log.info("the end of the snapshot of job %s is not recorded: %s", job_id, error)


def _note(attempt: Attempt, snapshot: OpenSnapshot) -> None:
    try:
        attempt.services.open_snapshots.note(snapshot)
    except WorkerError as error:  # such as a foreground run without a broker
        attempt.log.info("the snapshot is not recorded: %s", error)


def remove_snapshot(attempt: Attempt, vm: VM, vcenter: str, job_id: str, limit_s: float | None = None) -> bool:
    """Remove the snapshot of a backup job if it exists, and consolidate the disks if vSphere reports that need.

    Returns whether there was a snapshot. Raises ResourceBusy if the disks still need consolidation afterwards, and
    other WorkerErrors.
    """
    if snapshot := vm.own_snapshot(job_id):
        vm.remove_snapshot(snapshot, limit_s)
    try:
        vm.consolidate(limit_s)
    except SourceNotFound:
        raise
    except WorkerError:
        _note(attempt, OpenSnapshot(job_id, vcenter, vm.moref, time.time(), needs_consolidation=True))
        raise
    forget_snapshot(attempt, job_id)
    return snapshot is not None


def try_removal(
    attempt: Attempt, vm: VM, vcenter: str, limit_s: float | None = None, delays: Sequence[int] = ()
) -> bool:
    """Call ``remove_snapshot`` for this job. Return whether it succeeded.

    Another task may hold the VM, as often right after an export. Then try again after each of *delays*.
    They are multiples of ``lease_delay_s``.
    """
    for delay in (0, *delays):
        try:
            if delay:
                attempt.wait(delay * vm.options.lease_delay_s)
            remove_snapshot(attempt, vm, vcenter, attempt.job_id, limit_s)
            return True
        except WorkerError as error:
            attempt.log.warning("the snapshot of job %s on %s was not removed: %s", attempt.job_id, vm.moref, error)
            if not isinstance(error, ResourceBusy):
                break
    return False


def remove_leftover(attempt: Attempt, vcenter: str, vm: str) -> bool:
    """Call ``try_removal`` with a new session that ignores cancellation."""
    try:
        with attempt.services.connections.vcenter(vcenter, lambda: None) as session:
            # After an abort too, the VM may be busy for some seconds.
            return try_removal(attempt.for_cleanup(), session.find_vm(vm), vcenter, CLEAN_UP_S, _CLEAN_UP_DELAYS)
    except SourceNotFound:
        forget_snapshot(attempt, attempt.job_id)
        return True  # the VM was deleted, and its snapshots with it
    except InvalidRequest:
        return True  # the settings lack the vCenter, so no attempt has made a snapshot
    except WorkerError as error:
        if attempt.number == 1 and vcenter not in attempt.reached:
            return False  # the only attempt has made no snapshot
        attempt.log.warning("job %s may have left a snapshot behind: %s", attempt.job_id, error)
        return False
