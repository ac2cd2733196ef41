"""Stores that are owed an artifact get it by themselves: each by a copy job, which goes on trying for a week."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.jobs import find_job
from ssvm_worker.jobs.request import JobRequest, fingerprint, parse_request
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring.assembly import new_job

_LOG = logging.getLogger("ssvm.owed")


def order_copies(settings: Settings, ledger: Ledger, record: Record, result: dict[str, Any]) -> list[Record]:
    """Queue a copy for each store that the job's result says is owed, and note its id there as ``copy_job``.

    The doorbells are the caller's to ring, after the job's end: a copy waits until nobody writes the artifact. Safe to
    repeat: the ids follow from the job's own.
    """
    copies = []
    for store, owed in result.get("owed", {}).items():
        new = new_job(settings, find_job("copy"), _request(record.job_id, store, owed, result), zone=record.zone)
        try:
            copy, _ = ledger.submit(replace(new, traceparent=record.traceparent))
        except InvalidRequest as error:
            _LOG.warning("job %s: store %s stays owed: %s", record.job_id, store, error)
            continue
        owed["copy_job"] = copy.job_id
        copies.append(copy)
    return copies


def _request(job_id: str, store: str, owed: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    it = Artifact.of_prefix(owed["artifact"])
    return {
        "job_id": _copy_id(job_id, store),
        "kind": it.kind,
        "account": it.account,
        "id": it.id,
        "volume": it.volume,
        "source": result["stores"][0],
        "stores": [store],
        "patient": True,
    }


def _copy_id(job_id: str, store: str) -> str:
    plain = f"{job_id}.owed.{store}"
    try:
        return parse_request(JobRequest, {"job_id": plain}, "").job_id
    except InvalidRequest:  # too long, or a store's name has characters that an id may not have
        return f"owed.{fingerprint(plain)}"
