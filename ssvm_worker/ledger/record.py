"""The record of a job as Python values: the stored fields, the public JSON, and claims."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from datetime import UTC, datetime
from typing import Any, TypeVar

from ssvm_worker.config.schema import CONTRACT_VERSION
from ssvm_worker.errors import ObjectNotFound, Retryable

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = STATES = ("queued", "running", "succeeded", "failed", "cancelled")
#: Final states. Only a user's retry changes them.
ENDED = (SUCCEEDED, FAILED, CANCELLED)

#: The lane of uploads. `ssvm serve` runs them while a client sends. No worker takes them, and no message is sent.
INBOUND = "inbound"
#: The lane of the counters for jobs that run inside another job or a command. They take no place of a worker.
HELD = "held"

#: The fields of an ended job, in the order in which lua/include/records.lua stores them behind the attempts.
#: New fields are appended, because older records end earlier.
ENDED_FIELDS = (
    *("job", "zone", "lane", "state", "request", "resource", "callback_url", "priority", "account", "uses"),
    *("traceparent", "created", "updated", "not_before", "tries", "progress", "result", "error", "cancel"),
    *("cancelled_by", "callback_state", "callback_tries", "callback_error"),
)

#: More attempts come only from a damaged record.
_MAX_ATTEMPTS = 10_000

Request = dict[str, Any]


class WorkerLost(Retryable):
    """The error of an attempt whose worker died, froze, or was cut off for longer than its claim."""


def queue_name(zone: str, lane: str) -> str:
    """Return the Celery queue of a lane in a zone. Other programs rely on this name."""
    return f"ssvm.{zone}.{lane}"


@dataclass(frozen=True)
class NewJob:
    """The fields of a submitted job."""

    job_id: str
    job: str
    zone: str
    lane: str
    request: Request
    #: The name that only one running job may hold; "" for none.
    resource: str = ""
    callback_url: str | None = None
    #: The submitter's W3C trace context; "" for none.
    traceparent: str = ""
    #: 0 to 9. Jobs with a higher priority run first.
    priority: int = 0
    #: The account that shares the lane fairly with other accounts; "" for the administrator.
    account: str = ""
    #: The limits that count this job, as ``store:zone1/primary``.
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Beside:
    """A value that the worker of a new job reads, such as a secret that the record must not show."""

    key: str
    value: str
    #: How long the broker keeps it.
    seconds: int


@dataclass(frozen=True)
class AttemptRecord:
    """One run of the job. Times are seconds since the epoch by the broker's clock. *ended* is 0 while it runs."""

    number: int
    worker: str
    started: float
    ended: float = 0.0
    #: The error object, or None.
    error: dict[str, Any] | None = None
    #: The user that asked for it by a retry; "" for an automatic attempt.
    by: str = ""
    host: str = ""
    #: Bytes that the attempt moved, as last reported. An attempt that died may have moved more.
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the public JSON."""
        shown = {
            "number": self.number,
            "worker": self.worker,
            "host": self.host,
            "started": iso(self.started),
            "ended": iso(self.ended),
            "error": self.error,
            "bytes": self.bytes,
        }
        return shown | ({"retried_by": self.by} if self.by else {})


@dataclass(frozen=True)
class Callback:
    """The state of the callback: "" (not due) | pending | delivered | failed."""

    url: str = ""
    state: str = ""
    tries: int = 0
    error: str = ""


@dataclass(frozen=True)
class Record:
    """One job. Times are seconds since the epoch by the broker's clock; 0 means none."""

    job_id: str
    job: str
    zone: str
    lane: str
    state: str
    request: Request
    resource: str = ""
    #: The last 20 attempts.
    attempts: tuple[AttemptRecord, ...] = ()
    progress: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    created: float = 0.0
    updated: float = 0.0
    not_before: float = 0.0
    cancel_requested: bool = False
    cancelled_by: str = ""
    #: The final state that the next attempt gives the job, after it has removed leftovers; "" for a job that runs.
    ending: str = ""
    #: Attempts since the submit or the last retry by a user that count against max_attempts.
    tries: int = 0
    callback: Callback = field(default_factory=Callback)
    #: The submitter's W3C trace context.
    traceparent: str = ""
    priority: int = 0
    #: The limit at which the job waits, as ``store:zone1/primary``; "" for none.
    waits_for: str = ""

    @property
    def attempted(self) -> int:
        """Return the number of attempts."""
        return self.attempts[-1].number if self.attempts else 0

    @property
    def queue(self) -> str:
        """Return the name of its Celery queue."""
        return queue_name(self.zone, self.lane)

    @property
    def ended(self) -> bool:
        """Return whether the job is in a final state."""
        return self.state in ENDED

    def to_dict(self, redact: Callable[[Request], Request] = dict) -> dict[str, Any]:
        """Return the public JSON. *redact* masks the secrets of the request."""
        callback = {"state": self.callback.state or None, "tries": self.callback.tries}
        callback["error"] = self.callback.error or None
        return {
            "schema": CONTRACT_VERSION,
            "job_id": self.job_id,
            "job": self.job,
            "zone": self.zone,
            "lane": self.lane,
            "state": self.state,
            "attempts": [each.to_dict() for each in self.attempts],
            "progress": self.progress,
            "result": self.result,
            "error": self.error,
            "request": redact(self.request),
            "created": iso(self.created),
            "updated": iso(self.updated),
            "not_before": iso(self.not_before),
            "priority": self.priority,
            "waits_for": self.waits_for or None,
            "cancel_requested": self.cancel_requested,
            "cancelled_by": self.cancelled_by or None,
            "callback": callback if self.callback.url else None,
        }


@dataclass(frozen=True)
class Claim:
    """The right to run one attempt. It lasts as long as the worker renews it."""

    job_id: str
    #: The fencing token: it grows with every claim of the job, and the ledger refuses older ones.
    token: int
    record: Record

    @property
    def number(self) -> int:
        """Return the number of the attempt, from 1."""
        return self.record.attempted


@dataclass
class InlineClaim:
    """The claim of a job that its submitter runs in the same process."""

    job_id: str
    #: The claim's fencing token.
    token: int
    #: Raises Cancelled("fenced") if the claim is lost.
    confirm: Callable[[], None]
    #: The result that the ledger stores if the block raises no error.
    result: dict[str, Any] = field(default_factory=dict)
    cancelled: bool = False
    fenced: bool = False

    def stop_reason(self) -> str | None:
        """Return the reason why the job must stop, or None."""
        if self.fenced:
            return "fenced"
        return "user" if self.cancelled else None


@dataclass(frozen=True)
class ClaimedJob:
    """A claimed job whose process has not started yet."""

    job_id: str
    token: int
    #: The number of the attempt, from 1.
    number: int
    #: The kind of job.
    job: str


def iso(seconds: float) -> str | None:
    """Return a time as ISO 8601 in UTC with milliseconds. Return None for 0 and for an invalid time."""
    try:
        shown = datetime.fromtimestamp(seconds, UTC) if seconds else None
    except (ValueError, OverflowError, OSError):
        return None
    return shown.isoformat(timespec="milliseconds").replace("+00:00", "Z") if shown else None


def place_of(counter: str) -> tuple[str, str, str]:
    """Return state, zone and lane of a counter's name. Older versions allowed zone names with blanks."""
    state, _, rest = counter.partition(" ")
    zone, _, lane = rest.rpartition(" ")
    return state, zone, lane


def number_of(text: str) -> int | None:
    """Return a stored whole number, 0 for an empty text. None: another program has written it."""
    digits = text.removeprefix("-")
    return int(text or 0) if not text or (digits.isascii() and digits.isdecimal() and len(digits) < 20) else None


_T = TypeVar("_T")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "tuple[str, ...]": list,
    "Mapping[str, str]": dict,
    "dict[str, Any]": dict,
}


def from_json(kind: type[_T], text: str) -> _T | None:
    """Return the dataclass whose fields are the JSON *text*. None for a text of another form.

    One bad value must not hide all others. A newer version may store more fields.
    """
    try:
        values = json.loads(text)
        known = {each.name: each.type for each in fields_of(kind) if each.name in values}  # type: ignore[arg-type]
        for name, annotation in known.items():
            items = values[name] if str(annotation) in ("tuple[str, ...]", "Mapping[str, str]") else ()
            items = [*items.values()] if isinstance(items, dict) else items
            if not isinstance(values[name], _KINDS[str(annotation)]) or not all(isinstance(i, str) for i in items):
                return None
        return kind(**{name: tuple(each) if isinstance(each := values[name], list) else each for name in known})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def unpack_ended(job_id: str, text: str) -> dict[str, str]:
    """Return the fields of an ended job's stored text, as ``from_hash`` reads them."""
    count, *values = text.split("\0")
    if number_of(count) is None:
        return {"job_id": job_id, "attempts": "unreadable"}
    names = [*(f"a{number}" for number in range(1, min(int(count or 0), len(values)) + 1)), *ENDED_FIELDS]
    given = zip(names, values, strict=False)  # a record of an older version has fewer
    return {"job_id": job_id, "attempts": count or "0"} | {name: value for name, value in given if value}


def from_hash(fields: Mapping[str, str]) -> Record:
    """Return the record of a job's stored fields.

    An unreadable record becomes a record with an error, so that a list of jobs still shows the others.
    """
    try:
        return _read(fields)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        problem = f"The record cannot be read: {type(error).__name__}"
        shown = ObjectNotFound(problem, fields.get("job_id", ""), "Submit the job again under a new job_id").as_dict()
        names = ("job_id", "job", "zone", "lane", "state")
        job_id, job, zone, lane, state = (fields.get(name) or "?" for name in names)
        return Record(job_id, job, zone, lane, state, {}, resource=fields.get("resource", ""), error=shown)


def _read(fields: Mapping[str, str]) -> Record:
    numbers = range(1, min(int(fields.get("attempts", 0)), _MAX_ATTEMPTS) + 1)
    queue = fields.get("queue", "")
    return Record(
        job_id=fields["job_id"],
        job=fields["job"],
        zone=fields["zone"],
        lane=fields["lane"],
        state=fields["state"],
        request=_json(fields["request"]) or {},
        resource=fields.get("resource", ""),
        attempts=tuple(_attempt(number, text) for number in numbers if (text := fields.get(f"a{number}"))),
        progress=_json(fields.get("progress")),
        result=_json(fields.get("result")),
        error=_json(fields.get("error")),
        created=float(fields["created"]),
        updated=float(fields["updated"]),
        not_before=float(fields.get("not_before") or 0),
        cancel_requested=fields.get("cancel", "") == "1",
        cancelled_by=fields.get("cancelled_by", ""),
        ending=fields.get("ending", ""),
        tries=int(fields.get("tries", 0)),
        callback=Callback(
            url=fields.get("callback_url", ""),
            state=fields.get("callback_state", ""),
            tries=int(fields.get("callback_tries") or 0),
            error=fields.get("callback_error", ""),
        ),
        traceparent=fields.get("traceparent", ""),
        priority=int(fields.get("priority") or 0),
        waits_for="" if queue.startswith("lane:") else queue,
    )


def _attempt(number: int, text: str) -> AttemptRecord:
    values = _json(text) or {}
    return AttemptRecord(
        number,
        values.get("worker", ""),
        float(values.get("started") or 0),
        float(values.get("ended") or 0),
        _json(values.get("error")),
        values.get("by", ""),
        values.get("host", ""),
        int(values.get("bytes") or 0),
    )


def _json(text: str | None) -> dict[str, Any] | None:
    value = json.loads(text) if text else None
    if not isinstance(value, dict | None):
        raise TypeError
    return value
