"""Queue a job that removes the snapshot which an ended backup job could not remove. Such a job retries for a week."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import InvalidRequest, StoreDenied
from ssvm_worker.jobs import find_job
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.open_snapshots import OpenSnapshots
from ssvm_worker.ledger.record import Claim, Record
from ssvm_worker.wiring.assembly import new_job

from .replication import derived_id

_LOG = logging.getLogger("ssvm.snapshots")


def order_removal(
    settings: Settings, ledger: Ledger, claim: Claim, snapshots: OpenSnapshots, result: dict[str, Any]
) -> list[Record]:
    """Queue the removal if the snapshot of a backup job is still open, and store its id as ``removal_job``.

    Safe to repeat: the id is derived from the job and the attempt.
    """
    record = claim.record
    found = []
    with suppress(StoreDenied):
        found = [each for each in snapshots.all() if each.job_id == record.job_id]
    if not found:
        return []
    request = {name: record.request[name] for name in ("account", "volume", "id", "vcenter")}
    request |= {
        "job_id": derived_id(f"{record.job_id}.snapshot{claim.number}"),
        "vm": found[0].vm,
        "backup": record.job_id,
        "patient": True,
    }
    new = new_job(settings, find_job("consolidate"), request, zone=record.zone)
    try:
        removal, _ = ledger.submit(replace(new, traceparent=record.traceparent))
    except InvalidRequest as error:
        _LOG.warning("job %s: the removal of its snapshot is not queued: %s", record.job_id, error)
        return []
    result["removal_job"] = removal.job_id
    return [removal]
