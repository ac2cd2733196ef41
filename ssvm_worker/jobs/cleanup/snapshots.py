"""The removal of snapshots whose backup job has ended. A crash or a failed removal leaves such snapshots behind."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ssvm_worker.errors import Cancelled, SourceNotFound, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup.snapshot_removal import forget_snapshot, remove_snapshot
from ssvm_worker.units import human_duration

if TYPE_CHECKING:
    from ssvm_worker.vmware.session import VCenterSession

#: Time-out in seconds for one removal. vSphere then continues it, and the next clean-up checks the result.
_LIMIT_S = 900.0


def remove_snapshots(
    attempt: Attempt, vcenter: str, older_than_s: float, dry_run: bool, found: list[dict[str, Any]]
) -> None:
    """Remove the snapshots of backup jobs that have ended according to the ledger.

    A snapshot of an unknown job may belong to another installation: only `ssvm doctor` lists it.
    Adds the removed snapshots, or with *dry_run* those to remove, to *found*.
    A busy VM does not stop the removal on the others: the first error is raised at the end.
    """
    failed: list[WorkerError] = []
    with attempt.services.connections.vcenter(vcenter, attempt.check) as session:
        for each in session.leftovers():
            if each.created > time.time() - older_than_s or not attempt.services.jobs.ended(each.job_id):
                continue
            attempt.check()
            where = f"{each.vm_name} ({each.vm}): {each.snapshot.name}"
            age = human_duration(max(0.0, time.time() - each.created))
            why = f"made {age} ago by the job {each.job_id}, which has ended"
            attempt.log.info("%s snapshot %s", "would remove" if dry_run else "removing", where)
            try:
                if not dry_run:
                    remove_snapshot(attempt, session.find_vm(each.vm), vcenter, each.job_id, _LIMIT_S)
            except Cancelled:
                raise
            except WorkerError as error:
                failed.append(error)
                continue
            found.append({"store": vcenter, "what": "snapshot", "where": where, "objects": 1, "bytes": 0, "why": why})
        if not dry_run:
            _forget_removed(attempt, session, vcenter, older_than_s, failed)
    if failed:
        raise failed[0]


def _forget_removed(
    attempt: Attempt, session: VCenterSession, vcenter: str, older_than_s: float, failed: list[WorkerError]
) -> None:
    """Consolidate the disks that removed snapshots have left, and forget the snapshots that no longer exist."""
    for each in attempt.services.open_snapshots.all():
        if each.vcenter != vcenter or each.created > time.time() - older_than_s:
            continue
        try:
            vm = session.find_vm(each.vm)
            if attempt.services.jobs.ended(each.job_id) or vm.own_snapshot(each.job_id) is None:
                remove_snapshot(attempt, vm, vcenter, each.job_id, _LIMIT_S)
        except SourceNotFound:
            forget_snapshot(attempt, each.job_id)
        except Cancelled:
            raise
        except WorkerError as error:
            failed.append(error)
