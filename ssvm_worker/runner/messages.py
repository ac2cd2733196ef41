"""From a message to a record: what a server in any language sent becomes a job of the ledger, or a failed one."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssvm_worker.config.schema import LANES, Settings
from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.jobs import JOBS, Job, find_job
from ssvm_worker.jobs.request import JobRequest, kept, parse_request
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob, Record
from ssvm_worker.operations.traces import traceparent
from ssvm_worker.wiring.assembly import new_job

from .screening import CLAIM, first_argument

#: What a job's name may look like, as it stands in keys and counters of the ledger.
_NAME = re.compile(r"[a-z][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Message:
    """What Celery hands over."""

    job: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    #: The Celery task's id: the job's, if the request brings none.
    task_id: str
    #: The trace context of its sender, if there is one.
    traceparent: str = ""
    #: Which worker has it, as Celery and Flower show it.
    worker: str = ""
    #: The job that this worker's main process has claimed, and the claim's token; see tasks/claim_strategy.py.
    claim: tuple[str, int] | None = None

    @classmethod
    def of(cls, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Message:
        """The message for which Celery runs that task of ours."""
        request = task.request
        parent = traceparent(request.get("traceparent"))
        claim = request.get(CLAIM)
        job = task.name.removeprefix("ssvm.")
        return cls(job, args, kwargs, request.id, parent, request.hostname or "", tuple(claim) if claim else None)

    @property
    def job_id(self) -> str:
        """The job that it is about, as far as it tells: an order says so, a request may; "" for what no id can be."""
        first = self.args[0] if self.args else {}
        named = first.get("job_id") if isinstance(first, dict) else first
        return _valid("job_id", named) or _valid("job_id", self.task_id)

    @property
    def is_doorbell(self) -> bool:
        """Whether it names a job, and nothing else."""
        return len(self.args) == 1 and isinstance(self.args[0], dict) and list(self.args[0]) == ["job_id"]


def accept(ledger: Ledger, settings: Settings, message: Message) -> Record:
    """The record of the job that the message is about, written first if it is new. Safe to repeat.

    A request that cannot be run is written down as a failed job, and its InvalidRequest raised; so is, without a
    record, a doorbell for a job that is unknown (ObjectNotFound) and an id that belongs to another request.
    """
    job = find_job(message.job)
    data = _argument(message) if message.is_doorbell else None
    if data is not None:
        return ledger.get(data["job_id"])
    try:
        task_id = _valid("job_id", message.task_id)
        new = new_job(settings, job, _argument(message), default_id=task_id)
    except InvalidRequest as error:
        ledger.refuse(_refused(settings, job, message), error)
        raise
    return ledger.submit(replace(new, traceparent=message.traceparent))[0]


def job_id_of(message: Message) -> tuple[str, str]:
    """The job that an order to retry or to cancel is about, and who gave it."""
    data = (
        _argument(message)
        if message.args and not isinstance(message.args[0], str)
        else {"job_id": message.args[0]}
        if message.args
        else {}
    )
    job_id = _valid("job_id", data.get("job_id", ""))
    if not job_id:
        raise InvalidRequest("The id of the job is missing", f"ssvm.{message.job}", 'Send ["ID"] or [{"job_id": "ID"}]')
    return job_id, str(data.get("by") or "celery")[:200]


def _argument(message: Message) -> dict[str, Any]:
    if len(message.args) == 1 and not message.kwargs and isinstance(message.args[0], dict):
        return message.args[0]
    what = f"The message has {len(message.args)} arguments and {len(message.kwargs)} keyword arguments"
    raise InvalidRequest(what, f"ssvm.{message.job}", "Send one argument, the request object")


def refuse(ledger: Ledger, settings: Settings, message: Any, error: Exception) -> None:
    """Write down as failed the job of kombu's *message*, if it has an id; changes no known job.

    Nothing is written for tasks that are no jobs, such as ``ssvm.retry``.
    """
    headers = message.headers if isinstance(message.headers, dict) else {}
    data = first_argument(message)
    job_id = _valid("job_id", data.get("job_id")) or _valid("job_id", headers.get("id"))
    name = str(headers.get("task")).removeprefix("ssvm.")
    if not job_id or name in ("retry", "cancel", "reap"):
        return
    if not isinstance(error, WorkerError):
        error = InvalidRequest(f"The worker cannot read the message: {type(error).__name__}: {error!a:.200}")
    if name in JOBS:
        new = _refused(settings, JOBS[name], Message(name, [data], {}, job_id))
    else:
        lane = str(message.delivery_info.get("routing_key")).rpartition(".")[2]
        known = name if _NAME.fullmatch(name) else "unknown"
        new = NewJob(job_id, known, settings.zone, lane if lane in LANES else "maintenance", {"job_id": job_id})
    ledger.refuse(new, error)


def _refused(settings: Settings, job: Job, message: Message) -> NewJob:
    """What can be kept of a request that is wrong: whose it is, and whom to tell."""
    data = message.args[0] if message.args and isinstance(message.args[0], dict) else {}
    job_id = _valid("job_id", data.get("job_id")) or _valid("job_id", message.task_id) or uuid.uuid4().hex
    return NewJob(
        job_id=job_id,
        job=job.name,
        zone=settings.zone,
        lane=job.lane,
        request=kept(job.Request, data) | {"job_id": job_id},
        callback_url=_valid("callback_url", data.get("callback_url")),
    )


def _valid(name: str, value: Any) -> str:
    """The value of one field that every request has, or "" if it is not fit to be used."""
    try:
        return getattr(parse_request(JobRequest, {name: value}, ""), name) or ""
    except InvalidRequest:
        return ""
