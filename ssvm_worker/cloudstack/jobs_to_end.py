"""Run a job for a command that the server waits for: submit it or attach to it, and wait for its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from typing import Any

from ssvm_worker.config.schema import SERVER_PREFIX
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, Permanent, ResourceBusy, StoreAway
from ssvm_worker.ledger.record import QUEUED, SUCCEEDED, Record

from .services import Services

#: The name by which the record of a job says who has retried or cancelled it.
BY = "CloudStack"
#: Seconds between two looks at the record.
_LOOK_S = 0.1
#: Seconds after which a job that waits for its store is given up.
_AWAY_S = 15.0
#: The longest time limit of a command in seconds. The ``wait`` of a migration between stores is of weeks.
_LONGEST_S = 86400.0


def limit_of(wait: int | None) -> float:
    """Return how many seconds a command with this ``wait`` may take: a bit less than the server waits for the answer.

    The server waits for twice the ``wait`` of a command. 0 means its default, 1800 seconds.
    """
    return min(_LONGEST_S, 2.0 * (wait or 1800) - 5.0)


def run_job(services: Services, job: str, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Return the result of a job with this request. While it runs, the same command attaches to it.

    Raises as ``wait_for_job``. After the end of the job the same command gets a new job, because the files may have
    changed. The new job ends quickly if nothing is left to do.
    """
    job_id = start_job(services, job, job_id_of(job, request), request)
    return wait_for_job(services, job_id, limit_s).result or {}


def job_id_of(operation: str, *content: object) -> str:
    """Return the id of the job for a command with that content."""
    return f"{SERVER_PREFIX}{operation}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]}"


def start_job(services: Services, job: str, job_id: str, request: dict[str, Any]) -> str:
    """Submit the job, or attach to it while it runs. Return its id, which has a suffix for each repetition.

    A cancelled job whose attempt still removes what it has written is over: the new job waits for it.
    """
    number = 0
    while True:
        each = f"{job_id}.{number}" if number else job_id
        try:
            record = services.jobs.job(each)
        except ObjectNotFound:
            return services.jobs.submit(job, job_id=each, **request).job_id
        if not record.ended and not record.cancel_requested:
            return each
        number += 1


def wait_for_job(services: Services, job_id: str, limit_s: float) -> Record:
    """Return the record of a job that has succeeded. Raise Permanent with its error if it has failed.

    After *limit_s* seconds, or if its store is away, cancel the job and raise. So it never runs after the server was
    told that it failed.
    """
    began = time.monotonic()
    while not (record := services.jobs.job(job_id)).ended:
        waited = time.monotonic() - began
        if waited > limit_s:
            problem = ResourceBusy(f"The job has not ended after {limit_s:g} s", job_id, "Check that workers run")
            return _given_up(services, job_id, problem)
        error = record.attempts[-1].error if record.state == QUEUED and record.attempts else None
        if error and error.get("error") == StoreAway.__name__ and waited > _AWAY_S:
            away = StoreAway(*(str(error.get(name, "")) for name in ("what", "where", "remedy")))
            return _given_up(services, job_id, away)
        time.sleep(_LOOK_S)
    return _succeeded(record)


def _given_up(services: Services, job_id: str, problem: Exception) -> Record:
    """Cancel the job and raise the problem. Return the record if it has succeeded meanwhile."""
    with contextlib.suppress(InvalidRequest):
        services.jobs.cancel(job_id, by=BY)
    record = services.jobs.job(job_id)
    if record.state == SUCCEEDED:
        return record
    raise problem


def _succeeded(record: Record) -> Record:
    if record.state == SUCCEEDED:
        return record
    error = record.error or {"what": f"The job is {record.state}"}
    raise Permanent(*(str(error.get(name, "")) for name in ("what", "where", "remedy")))
