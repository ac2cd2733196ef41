"""The record of a job as values: what is stored, what outsiders read, what a claim gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ssvm_worker.errors import ObjectNotFound, Retryable

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = STATES = ("queued", "running", "succeeded", "failed", "cancelled")
#: States that only a user's retry leaves.
ENDED = (SUCCEEDED, FAILED, CANCELLED)

#: The lane of uploads, which `ssvm serve` runs while somebody sends. No worker takes it, and nothing rings for it.
INBOUND = "inbound"
#: Where jobs are counted that run within another one, or within a command, and take no place of a worker.
HELD = "held"

#: What is kept of a job that has ended, behind its attempts, in this order; what is new goes to the end.
KEPT = (
    *("job", "zone", "lane", "state", "request", "resource", "callback_url", "priority", "account", "uses"),
    *("traceparent", "created", "updated", "not_before", "tries", "progress", "result", "error", "cancel"),
    *("cancelled_by", "callback_state", "callback_tries", "callback_error"),
)

Request = dict[str, Any]


class WorkerLost(Retryable):
    """The attempt's worker died, froze, or was cut off for longer than its claim."""


def queue_name(zone: str, lane: str) -> str:
    """The Celery queue of a lane in a zone; outsiders rely on this name."""
    return f"ssvm.{zone}.{lane}"


@dataclass(frozen=True)
class NewJob:
    """What is written when a job is submitted."""

    job_id: str
    job: str
    zone: str
    lane: str
    request: Request
    #: What only one running job may write; "" for none.
    resource: str = ""
    callback_url: str | None = None
    #: The trace context of whoever submitted it, W3C's; "" for none.
    traceparent: str = ""
    #: 0 to 9; the higher is run first.
    priority: int = 0
    #: Who shares the lane fairly with others; "" for the administrator's own.
    account: str = ""
    #: Limits that it counts for, as ``store:zone1/primary``.
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttemptRecord:
    """One run of the job. Times are seconds since the epoch by the broker's clock; ended is 0 while it runs."""

    number: int
    worker: str
    started: float
    ended: float = 0.0
    #: The error object, or None.
    error: dict[str, Any] | None = None
    #: Who asked for it by a retry; "" for an automatic one.
    by: str = ""
    host: str = ""
    #: That it moved, as far as is known; what died may have moved some more.
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON shape."""
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
    """How far the POST of the record has come; state is "" (not due) | pending | delivered | failed."""

    url: str = ""
    state: str = ""
    tries: int = 0
    error: str = ""


@dataclass(frozen=True)
class Record:
    """One job. Times are seconds since the epoch by the broker's clock, 0 for none."""

    job_id: str
    job: str
    zone: str
    lane: str
    state: str
    request: Request
    resource: str = ""
    #: The last twenty.
    attempts: tuple[AttemptRecord, ...] = ()
    progress: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    created: float = 0.0
    updated: float = 0.0
    not_before: float = 0.0
    cancel_requested: bool = False
    cancelled_by: str = ""
    #: The state that the next claim must end the job in, after its leftovers are removed; "" for a job that shall run.
    ending: str = ""
    #: Attempts counted against max_attempts since the submit or the last retry by a user.
    tries: int = 0
    callback: Callback = field(default_factory=Callback)
    #: The trace context of whoever submitted it.
    traceparent: str = ""
    priority: int = 0
    #: The limit at which it waits, as ``store:zone1/primary``; "" for none.
    waits_for: str = ""

    @property
    def attempted(self) -> int:
        """How many attempts there were."""
        return self.attempts[-1].number if self.attempts else 0

    @property
    def queue(self) -> str:
        """Where its messages stand."""
        return queue_name(self.zone, self.lane)

    @property
    def ended(self) -> bool:
        """Whether it is in a final state."""
        return self.state in ENDED

    def to_dict(self, redact: Callable[[Request], Request] = dict) -> dict[str, Any]:
        """The JSON shape that outsiders read; *redact* masks the secrets of the request."""
        return {
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
            "callback": self._callback_dict() if self.callback.url else None,
        }

    def _callback_dict(self) -> dict[str, Any]:
        known = self.callback
        return {"state": known.state or None, "tries": known.tries, "error": known.error or None}


@dataclass(frozen=True)
class Claim:
    """The right to run one attempt, for as long as it is renewed."""

    job_id: str
    #: Grows with every claim of the job; whoever shows an older one is refused.
    token: int
    record: Record

    @property
    def number(self) -> int:
        """The attempt's number, from 1."""
        return self.record.attempted


@dataclass
class InlineClaim:
    """A job that whoever has submitted it runs on the spot."""

    job_id: str
    #: The claim's fencing token.
    token: int
    #: Raises Cancelled("fenced") unless the claim still stands.
    confirm: Callable[[], None]
    #: What the ledger is told when all went well.
    result: dict[str, Any] = field(default_factory=dict)
    cancelled: bool = False
    fenced: bool = False

    def stop_reason(self) -> str | None:
        """Why it must stop, or None."""
        if self.fenced:
            return "fenced"
        return "user" if self.cancelled else None


@dataclass(frozen=True)
class ClaimedJob:
    """A job that is claimed for whoever begins with it."""

    job_id: str
    token: int
    #: The attempt's number, from 1.
    number: int
    #: What kind of job it is.
    job: str


def iso(when: float) -> str | None:
    """ISO 8601 in UTC with milliseconds; None for 0, and for what is no time."""
    try:
        shown = datetime.fromtimestamp(when, UTC) if when else None
    except (ValueError, OverflowError, OSError):
        return None
    return shown.isoformat(timespec="milliseconds").replace("+00:00", "Z") if shown else None


def place_of(counter: str) -> tuple[str, str, str]:
    """State, zone and lane of a counter's name; an older version took names of zones with blanks in them."""
    state, _, rest = counter.partition(" ")
    zone, _, lane = rest.rpartition(" ")
    return state, zone, lane


def unpacked(job_id: str, text: str) -> dict[str, str]:
    """What the scripts keep of a job that has ended, as ``from_hash`` reads it."""
    count, *values = text.split("\0")
    names = [*(f"a{number}" for number in range(1, int(count or 0) + 1)), *KEPT]
    given = zip(names, values, strict=False)  # a record of before has less
    return {"job_id": job_id, "attempts": count or "0"} | {name: value for name, value in given if value}


def from_hash(fields: Mapping[str, str]) -> Record:
    """Read what the scripts keep of a job that waits or runs.

    A record that cannot be read says so as its error: one of them must not end a list of all others.
    """
    try:
        return _read(fields)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        what = f"The record cannot be read: {type(error).__name__}"
        told = ObjectNotFound(what, fields.get("job_id", ""), "Submit the job again under a new job_id")
        job_id, job, zone, lane, state = (
            fields.get(name) or "?" for name in ("job_id", "job", "zone", "lane", "state")
        )
        return Record(job_id, job, zone, lane, state, {}, resource=fields.get("resource", ""), error=told.as_dict())


def _read(fields: Mapping[str, str]) -> Record:
    return Record(
        job_id=fields["job_id"],
        job=fields["job"],
        zone=fields["zone"],
        lane=fields["lane"],
        state=fields["state"],
        request=_json(fields["request"]) or {},
        resource=fields.get("resource", ""),
        attempts=tuple(_attempt(fields, number) for number in _attempts(fields)),
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
        callback=_callback(fields),
        traceparent=fields.get("traceparent", ""),
        priority=int(fields.get("priority") or 0),
        waits_for="" if fields.get("queue", "").startswith("lane:") else fields.get("queue", ""),
    )


def _attempts(fields: Mapping[str, str]) -> list[int]:
    """The numbers of the attempts that the record still has."""
    return [each for each in range(1, int(fields.get("attempts", 0)) + 1) if fields.get(f"a{each}")]


def _attempt(fields: Mapping[str, str], number: int) -> AttemptRecord:
    values = _json(fields.get(f"a{number}")) or {}
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


def _callback(fields: Mapping[str, str]) -> Callback:
    tries = int(fields.get("callback_tries") or 0)
    return Callback(
        fields.get("callback_url", ""), fields.get("callback_state", ""), tries, fields.get("callback_error", "")
    )


def _json(text: str | None) -> dict[str, Any] | None:
    value = json.loads(text) if text else None
    if not isinstance(value, dict | None):
        raise TypeError
    return value
