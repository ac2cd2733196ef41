"""The removal of snapshots whose backup job has ended. A crash or a failed removal leaves such snapshots behind."""

from __future__ import annotations

import time
from typing import Any

from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.units import human_duration

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
            where = f"{each.vm_name} ({each.vm}): {each.snapshot.name}"
            age = human_duration(max(0.0, time.time() - each.created))
            why = f"made {age} ago by the job {each.job_id}, which has ended"
            found.append({"store": vcenter, "what": "snapshot", "where": where, "objects": 1, "bytes": 0, "why": why})
            attempt.log.info("%s snapshot %s", "would remove" if dry_run else "removing", where)
            if not dry_run:
                session.remove(each, _LIMIT_S)
    return found
