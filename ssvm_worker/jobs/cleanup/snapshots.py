"""The removal of snapshots whose backup job has ended. A crash or a failed removal leaves such snapshots behind."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.units import human_duration

if TYPE_CHECKING:  # imports pyVmomi
    from ssvm_worker.vmware.snapshot import OldSnapshot

#: Time-out in seconds for one removal. vSphere then continues it, and the next clean-up checks the result.
_LIMIT_S = 900.0


def remove_snapshots(attempt: Attempt, vcenter: str, older_than_s: float, dry_run: bool) -> list[dict[str, Any]]:
    """Remove the snapshots of backup jobs that have ended according to the ledger.

    A snapshot of an unknown job may belong to another installation: only `ssvm doctor` lists it.
    Returns the removed snapshots, or with *dry_run* those to remove. Raises the error of a failed search or removal.
    """
    found = []
    with attempt.services.connections.vcenter(vcenter, attempt.check) as session:
        for each in session.leftovers():
            if each.created > time.time() - older_than_s or not attempt.services.jobs.ended(each.job_id):
                continue
            attempt.check()
            found.append(_described(vcenter, each))
            attempt.log.info("%s snapshot %s", "would remove" if dry_run else "removing", found[-1]["where"])
            if not dry_run:
                session.remove(each, _LIMIT_S)
    return found


def _described(vcenter: str, old: OldSnapshot) -> dict[str, Any]:
    age = human_duration(max(0.0, time.time() - old.created))
    why = f"made {age} ago by the job {old.job_id}, which has ended"
    where = f"{old.vm_name} ({old.vm}): {old.snapshot.name}"
    return {"store": vcenter, "what": "snapshot", "where": where, "objects": 1, "bytes": 0, "why": why}
