"""Queue a copy job for each store that missed an artifact. Such a job retries for a week."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.config.schema import SERVER_PREFIX, Settings
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.jobs import find_job
from ssvm_worker.jobs.request import JobRequest, fingerprint, parse_request
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring.assembly import new_job

_LOG = logging.getLogger("ssvm.replication")


def order_copies(settings: Settings, ledger: Ledger, record: Record, result: dict[str, Any]) -> list[Record]:
    """Queue a copy for each store in the result's ``owed``, and store its id there as ``copy_job``.

    The caller sends the messages after the end of the job, because a copy waits for the artifact's lock. Safe to
    repeat: the ids are derived from the job's id.
    """
    copies = []
    for store, owed in result.get("owed", {}).items():
        artifact = Artifact.of_prefix(owed["artifact"])
        request = {
            "job_id": derived_id(f"{record.job_id}.owed.{store}"),
            "kind": artifact.kind,
            "account": artifact.account,
            "id": artifact.id,
            "volume": artifact.volume,
            "source": result["stores"][0],
            "stores": [store],
            "patient": True,
        }
        of_server = record.job_id.startswith(SERVER_PREFIX)
        new = new_job(settings, find_job("copy"), request, zone=record.zone, of_server=of_server)
        try:
            copy, _ = ledger.submit(replace(new, traceparent=record.traceparent))
        except InvalidRequest as error:
            _LOG.warning("job %s: no copy to store %s is queued: %s", record.job_id, store, error)
            continue
        owed["copy_job"] = copy.job_id
        copies.append(copy)
    return copies


def derived_id(plain: str) -> str:
    """Return *plain* as a job id. If it is too long, or has a character that no id may have, return a digest of it."""
    try:
        return parse_request(JobRequest, {"job_id": plain}, "").job_id
    except InvalidRequest:
        return f"owed.{fingerprint(plain)}"
