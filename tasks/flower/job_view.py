"""The values of the pages of jobs, as templates show them. Secrets are masked, and the templates escape all text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ssvm_worker.cli import job_text
from ssvm_worker.cli.progress import progress_text
from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.job_filter import account_of
from ssvm_worker.ledger.record import AttemptRecord, Record, iso
from ssvm_worker.operations.health import idle
from ssvm_worker.units import human_duration, human_size
from ssvm_worker.wiring.assembly import shown

#: A relative time and the time in UTC.
When = tuple[str, str]
#: A digest in a text. Its first digits are enough to compare two.
_DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b")
#: What a user can do with a job in each state.
VERBS = {"failed": "retry", "cancelled": "retry", "running": "cancel", "queued": "cancel"}


@dataclass(frozen=True)
class JobView:
    """A job as text."""

    job_id: str
    job: str
    zone: str
    lane: str
    state: str
    #: The artifact, the account, and the name of the request.
    what: str
    account: str
    name: str
    #: How long the job is in its state, and who cancelled it.
    since: str
    by: str
    #: The reason for the state, without an error; and the error.
    why: str
    error: dict[str, str]
    progress: str
    bytes: int
    total: int
    created: When | None
    updated: When | None
    #: retry | cancel | ""
    verb: str
    #: The number of attempts.
    number: int


@dataclass(frozen=True)
class JobDetails(JobView):
    """A job as text, with all that its page shows."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    request: str = ""
    result: str = ""
    #: Each store that lacks the artifact, with the problem and the id of its copy job.
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    history: list[tuple[When | None, str]] = field(default_factory=list)


def summary(record: Record, hint: str = "") -> dict[str, Any]:
    """Return the fields of ``JobView``. *hint* says why no worker takes a queued job that nothing else holds back."""
    public = shown(record)
    why = job_text.why(record, public)
    if record.state == "queued" and not job_text.held(record):
        why = hint or why
    moved = public["progress"] or {}
    numbers = {name: moved.get(name) if type(moved.get(name)) is int else 0 for name in ("bytes", "total")}
    is_failed = record.state in ("failed", "cancelled")
    return {
        **{name: getattr(record, name) for name in ("job_id", "job", "zone", "lane", "state")},
        "what": job_text.what(public["request"]),
        "account": account_of(record),
        "name": str(public["request"].get("name") or ""),
        "since": job_text.since(record),
        "by": f"cancelled by {record.cancelled_by}" if record.cancelled_by else "",
        "why": _comma(why),
        "error": error_text(record.error) if is_failed else {},
        "progress": _comma(progress_text(moved)),
        **numbers,
        "created": when(record.created),
        "updated": when(record.updated),
        "verb": "" if record.cancel_requested and not record.ended else VERBS.get(record.state, ""),
        "number": record.attempted,
    }


def details(record: Record, settings: Settings) -> JobDetails:
    """Return all that the page of a job shows."""
    public = shown(record)
    result = dict(public["result"] or {})
    owed = result.pop("owed", None)
    values = summary(record, idle(settings, record.zone, record.lane) if record.state == "queued" else "")
    if record.state == "queued":
        values["why"] = values["why"] or "Workers are busy"
    callback = f"{record.callback.state}, {record.callback.tries} tries {record.callback.error}".strip()
    request = public["request"]
    stores = request.get("stores") or [request.get("store")]
    facts = {
        "Job": record.job,
        "Artifact": " ".join(filter(None, (str(request.get("kind") or ""), values["what"]))),
        "Name": values["name"],
        "Account": values["account"],
        "From": str(request.get("url") or request.get("source") or request.get("vcenter") or ""),
        "Stores": ", ".join(str(each) for each in stores if each) if isinstance(stores, list) else str(stores),
        "Zone and lane": f"{record.zone}, {record.lane}",
        "Priority": str(record.priority or ""),
        "Callback": callback if record.callback.url and record.callback.state else "",
    }
    return JobDetails(
        **values,
        facts=[(name, text) for name, text in facts.items() if text],
        request=_json(request),
        result=_json(result) if result else "",
        missing=list(_missing(owed)),
        attempts=[_attempt(each) for each in record.attempts],
        history=sorted(_history(record), key=lambda each: each[0][1] if each[0] else ""),
    )


def error_text(error: dict[str, Any] | None) -> dict[str, str]:
    """Return an error: its sentence, place and remedy.

    For a list, ``short`` is the sentence with the beginnings of its digests, and ``more`` is the rest.
    """
    if not error:
        return {}
    what, where, remedy = (str(error.get(name) or "") for name in ("what", "where", "remedy"))
    sentence = f"{error.get('error') or ''}: {what or error.get('message') or ''}".strip(": ")
    short = _DIGEST.sub(r"\1…", sentence)
    more = ". ".join(filter(None, (sentence if short != sentence else "", where, remedy)))
    return {"sentence": sentence, "short": short, "where": where, "remedy": remedy, "more": more}


def _comma(text: str) -> str:
    """Return the parts of a line for a terminal with commas between them."""
    return text.replace("  ", ", ")


def when(seconds: float) -> When | None:
    """Return a time as ``5 min ago`` and in UTC. None for no time and for an invalid one."""
    if not (utc := iso(seconds)):
        return None
    passed = max(0.0, time.time() - seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed // size:.0f} {unit} ago", utc
    return f"{passed:.0f} s ago", utc


def clock() -> str:
    """Return the time of day in UTC."""
    return datetime.now(UTC).strftime("%H:%M:%S")


def _missing(owed: Any) -> Iterator[tuple[str, str, str]]:
    for store, error in owed.items() if isinstance(owed, dict) else ():
        given = error if isinstance(error, dict) else {}
        yield str(store), error_text(given).get("sentence", ""), str(given.get("copy_job") or "")


def _attempt(attempt: AttemptRecord) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "by": attempt.by,
        "worker": attempt.worker,
        "host": "" if attempt.host in attempt.worker else attempt.host,
        "started": when(attempt.started),
        "lasted": human_duration(max(0.0, attempt.ended - attempt.started)) if attempt.ended else "still running",
        "moved": human_size(attempt.bytes),
        "error": error_text(attempt.error),
    }


def _history(record: Record) -> Iterator[tuple[When | None, str]]:
    """Yield the events of a job with their times. The ledger keeps the last 20 attempts."""
    yield when(record.created), "Submitted"
    for each in record.attempts:
        by = f", after a retry by {each.by}" if each.by else ""
        yield when(each.started), f"Attempt {each.number} started on {each.worker}{by}"
        if each.ended:
            outcome = error_text(each.error).get("sentence") or "without an error"
            yield when(each.ended), f"Attempt {each.number} ended: {outcome}"
    if record.cancelled_by:
        yield when(record.updated), f"Cancelled by {record.cancelled_by}"
    elif record.cancel_requested and not record.ended:
        yield when(record.updated), "A user has asked the worker to stop"
    elif record.ended:
        yield when(record.updated), f"The job {record.state}" if record.state != "cancelled" else "Cancelled"


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
