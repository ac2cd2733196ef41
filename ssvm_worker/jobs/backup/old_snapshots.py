"""Snapshots of ours on vCenters whose job has ended: those that a crash, or a removal that failed, has left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.units import human_duration

if TYPE_CHECKING:  # pyVmomi comes with it
    from ssvm_worker.vmware.old_snapshots import OldSnapshot

#: Seconds that one removal is waited for; vSphere goes on with it all the same, and the next clean-up looks again.
_LIMIT_S = 900.0


def remove_snapshots(attempt: Attempt, vcenter: str, older_than_s: float, dry_run: bool) -> list[dict[str, Any]]:
    """Remove from that vCenter what bears our name and the id of a job that the ledger knows to have ended.

    A snapshot of a job that is unknown here may be another installation's: `ssvm doctor` lists it, nobody removes it.
    Returns what went, or would. Raises what keeps us from looking or from removing one.
    """
    found = []
    with attempt.doors.vcenter(vcenter, check=attempt.check) as session:
        for each in session.leftovers():
            if each.when > time.time() - older_than_s or not attempt.jobs.ended(each.job_id):
                continue
            attempt.check()
            found.append(_told(vcenter, each))
            attempt.log.info("%s snapshot %s", "would remove" if dry_run else "removing", found[-1]["where"])
            if not dry_run:
                session.remove(each, _LIMIT_S)
    return found


def _told(vcenter: str, it: OldSnapshot) -> dict[str, Any]:
    age = human_duration(max(0.0, time.time() - it.when))
    why = f"made {age} ago by the job {it.job_id}, which has ended"
    where = f"{it.vm_name} ({it.vm}): {it.snapshot.name}"
    return {"store": vcenter, "what": "snapshot", "where": where, "objects": 1, "bytes": 0, "why": why}
