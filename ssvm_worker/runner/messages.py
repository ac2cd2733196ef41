"""Screen and parse messages: a message from a program in any language becomes a job of the ledger, or a failed one.

``screen`` runs before Celery reads a message. It keeps the task, its id, its arguments, and a trace context.
Everything else that a sender may write is dropped. The ledger handles times (``eta``, ``expires``). Jobs do not use
Celery's limits, stamps, chains and retries. Only the main process adds the claim of a job.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssvm_worker.config.schema import LANES, SERVER_PREFIX, Settings
from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.jobs import JOBS, Job, find_job
from ssvm_worker.jobs.request import MAX_BYTES, JobRequest, check_form, parse_request, storable_fields
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob, Record
from ssvm_worker.operations.traces import traceparent
from ssvm_worker.wiring.assembly import new_job

#: The header by which the main process passes a claim to a pool process: [job id, token].
CLAIM = "ssvm_claim"
#: The form of a job's name, as the ledger uses it in keys and counters.
_NAME = re.compile(r"[a-z][a-z0-9._-]{0,63}")
#: Tasks that are no jobs.
_ORDERS = ("retry", "cancel", "reap")
_REMEDY = "Send protocol 2 of Celery, with a JSON body: docs/reference/jobs.md"


def screen(message: Any) -> None:
    """Reduce kombu's *message* to protocol 2 with the parts that a job needs. Raise InvalidRequest if impossible."""
    if message.problem:
        raise InvalidRequest(message.problem, "", _REMEDY)
    headers = message.headers
    payload = _payload(message)
    if isinstance(payload, dict):  # protocol 1, which has everything in the body
        headers, payload = payload, [payload.get("args"), payload.get("kwargs", {}), {}]
    if not isinstance(payload, list) or len(payload) != 3:
        raise InvalidRequest("The body is not a list of arguments, keyword arguments and options", "", _REMEDY)
    args, kwargs = payload[:2]
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise InvalidRequest("The arguments are not a list, or the keyword arguments not an object", "", _REMEDY)
    task, task_id = headers.get("task"), headers.get("id")
    if not isinstance(task, str) or not isinstance(task_id, str):
        raise InvalidRequest("The message has no task and id that are strings", "", _REMEDY)
    check_form([args, kwargs, task, task_id], "the message")
    if kwargs or (args and task == "ssvm.reap"):
        raise _wrong_arguments(task, args, kwargs)
    lane = str(message.delivery_info.get("routing_key")).rpartition(".")[2]
    if (
        task[:5] == "ssvm."
        and task[5:] not in (*JOBS, *_ORDERS)
        and lane in LANES
        and Message("", args, {}, "").is_wakeup
    ):
        # The reaper sends this for a job of another version. Such a job would never end if its messages were refused.
        task = next(f"ssvm.{job.name}" for job in JOBS.values() if job.lane == lane)
    names = ("traceparent", "root_id", "expires") if task == "ssvm.reap" else ("traceparent", "root_id")  # of beat
    copied = {name: text for name in names if isinstance(text := headers.get(name), str)}
    message.headers = {"lang": "py", "task": task, "id": task_id, **copied}
    message.content_type, message.content_encoding = "application/json", "utf-8"
    message.body = json.dumps([args, kwargs, {}])


def _payload(message: Any) -> Any:
    if message.content_type != "application/json":
        raise InvalidRequest(f"The content type is {message.content_type!r:.100}, not application/json", "", _REMEDY)
    if len(message.body or "") > MAX_BYTES:
        what = f"The message has {len(message.body)} bytes; {MAX_BYTES} are allowed"
        raise InvalidRequest(what, "", "Leave out what no job needs")
    try:
        return json.loads(message.body or "")
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}", "", _REMEDY) from None


@dataclass(frozen=True)
class Message:
    """A message, as Celery passes it to a task."""

    job: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    #: The id of the Celery task. It becomes the job's id if the request has none.
    task_id: str
    #: The sender's W3C trace context; "" for none.
    traceparent: str = ""
    #: The worker that received it, as Celery and Flower show it.
    worker: str = ""
    #: Id and fencing token of the job that the main process has claimed; see tasks/claim_strategy.py.
    claim: tuple[str, int] | None = None

    @classmethod
    def of(cls, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Message:
        """Return the message for which Celery runs that task."""
        request = task.request
        parent = traceparent(request.get("traceparent"))
        claim = request.get(CLAIM)
        job = task.name.removeprefix("ssvm.")
        return cls(job, args, kwargs, request.id, parent, request.hostname or "", tuple(claim) if claim else None)

    @property
    def job_id(self) -> str:
        """Return the id in the message: that of an order or a request, else the task's; "" if none is valid."""
        first = self.args[0] if self.args else {}
        named = first.get("job_id") if isinstance(first, dict) else first
        return _valid("job_id", named) or _valid("job_id", self.task_id)

    @property
    def is_wakeup(self) -> bool:
        """Return whether the message names a known job, and nothing else."""
        return len(self.args) == 1 and isinstance(self.args[0], dict) and list(self.args[0]) == ["job_id"]


def accept(ledger: Ledger, settings: Settings, message: Message) -> Record:
    """Return the record of a message's job. Store a new job first. Safe to repeat.

    An invalid request is stored as a failed job, and raises InvalidRequest. Two errors store nothing: an id that
    belongs to another request (InvalidRequest), and a wake-up for an unknown job (ObjectNotFound).
    """
    job = find_job(message.job)
    if message.is_wakeup:
        return ledger.get(_argument(message)["job_id"])
    try:
        task_id = _valid("job_id", message.task_id)
        new = new_job(settings, job, _argument(message), default_id=task_id)
    except InvalidRequest as error:
        ledger.refuse(_refused(settings, job, message), error)
        raise
    return ledger.submit(replace(new, traceparent=message.traceparent))[0]


def job_id_of(message: Message) -> tuple[str, str]:
    """Return the job id of an order to retry or to cancel, and the user who gave the order."""
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
    raise _wrong_arguments(f"ssvm.{message.job}", message.args, message.kwargs)


def _wrong_arguments(task: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> InvalidRequest:
    what = f"The message has {len(args)} arguments and {len(kwargs)} keyword arguments"
    return InvalidRequest(what, f"{task:.100}", "Send one argument, the request object. ssvm.reap takes none")


def refuse(ledger: Ledger, settings: Settings, message: Any, error: Exception) -> None:
    """Store the job of kombu's *message* as failed, if the message has an id. A known job does not change.

    Nothing is stored for tasks that are no jobs, such as ``ssvm.retry``.
    """
    headers = message.headers if isinstance(message.headers, dict) else {}
    try:
        first = _payload(message)[0][0]  # the message may be wrong in any way
    except (InvalidRequest, LookupError, TypeError):
        first = {}
    data = first if isinstance(first, dict) else {}
    job_id = _free_id(data.get("job_id")) or _free_id(headers.get("id"))
    name = str(headers.get("task")).removeprefix("ssvm.")
    if not job_id or name in _ORDERS:
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
    """Return the job of an invalid request, with its id and its callback if these are valid."""
    data = message.args[0] if message.args and isinstance(message.args[0], dict) else {}
    job_id = _free_id(data.get("job_id")) or _free_id(message.task_id) or uuid.uuid4().hex
    return NewJob(
        job_id=job_id,
        job=job.name,
        zone=settings.zone,
        lane=job.lane,
        request=storable_fields(job.Request, data) | {"job_id": job_id},
        callback_url=_valid("callback_url", data.get("callback_url")),
    )


def _free_id(value: Any) -> str:
    """Return a job id that a sender may choose, or ""."""
    job_id = _valid("job_id", value)
    return "" if job_id.startswith(SERVER_PREFIX) else job_id


def _valid(name: str, value: Any) -> str:
    """Return the value of a field of JobRequest, or "" if the value is invalid."""
    try:
        return getattr(parse_request(JobRequest, {name: value}, ""), name) or ""
    except InvalidRequest:
        return ""
