"""Jobs as text for people: one line of a list, and the lines about one job."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ssvm_worker.ledger.job_filter import account_of
from ssvm_worker.ledger.record import iso
from ssvm_worker.units import human_duration, human_size, printable

from .output import cell, migration_report, missing_stores, painted
from .progress import progress_text

if TYPE_CHECKING:
    from ssvm_worker.ledger.record import Record

#: A generated id has 32 hexadecimal digits. Its beginning is enough, because commands take a unique prefix.
_SHORT_ID = 12
#: The columns of a list of jobs, before the reason. The zone is left out if it is the same in all rows.
_COLUMNS = ("id", "job", "zone", "what", "state", "since")
#: The least width of these columns.
_MIN_WHAT, _MIN_WHY = 8, 40
#: Width of the names in the lines about one job.
_NAME = 10


def row(record: Record, shown: dict[str, Any], *, full_ids: bool) -> dict[str, str]:
    """Return the cells of one line of `ssvm jobs`. *shown* is the public JSON, which contains no secret."""
    return {
        "id": record.job_id if full_ids else short_id(record.job_id),
        "job": record.job,
        "zone": record.zone,
        "what": what(shown["request"]) or "-",
        "state": record.state,
        "since": since(record),
        "why": why(record, shown),
    }


def short_id(job_id: str) -> str:
    """Return the beginning of a generated id, and any other id as it is. Commands take both."""
    return job_id[:_SHORT_ID] if re.fullmatch(r"[0-9a-f]{32}", job_id) else job_id


def table(rows: Iterable[dict[str, str]], width: int | None) -> Iterator[str]:
    """Yield the lines of `ssvm jobs`, each at most *width* columns wide. None: do not cut anything.

    The reason is the last column, or a second line where the last column would be too narrow.
    """
    cells = [{name: printable(text) for name, text in each.items()} for each in rows]
    columns = [name for name in _COLUMNS if name != "zone" or len({each["zone"] for each in cells}) > 1]
    widths = {name: max(len(name), *(len(each[name]) for each in cells)) for name in columns}
    if width and (excess := sum(widths.values()) + 2 * len(columns) - width) > 0:
        widths["what"] = max(_MIN_WHAT, widths["what"] - excess)
    rest = width and width - sum(widths.values()) - 2 * len(columns)
    has_own_line = rest is not None and rest < _MIN_WHY
    yield "  ".join(name.ljust(widths[name]) for name in columns) + ("" if has_own_line else "  why")
    for each in cells:
        line = "  ".join(painted(name, _cut(each[name], widths[name]).ljust(widths[name])) for name in columns)
        if not has_own_line:
            line += f"  {_cut(each['why'], rest)}"
        yield line.rstrip()
        if has_own_line and each["why"]:
            yield _cut(f"    {each['why']}", width)


def _cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else f"{text[: width - 1]}…"


def what(request: dict[str, Any]) -> str:
    """Return the artifact of a request, beginning with its account: ``2/510``, ``2/volume/backup``, or a key."""
    names = [str(request[name]) for name in ("account", "volume", "id") if request.get(name)]
    return "/".join(names) or str(request.get("key") or request.get("prefix") or "")


def since(record: Record) -> str:
    """Return how long the job is in its state, in one unit: ``12 min``."""
    start = record.attempts[-1].started if record.state == "running" and record.attempts else record.updated
    if record.state == "queued":
        start = record.created
    seconds = max(0.0, time.time() - start)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def why(record: Record, shown: dict[str, Any]) -> str:
    """Return the reason for the state, or the progress of a running job, as one line."""
    error = shown["error"] or {}
    if record.state == "queued":
        return waiting(record) or _sentence(error)
    if record.state == "running":
        moved = shown["progress"] or {}
        # The list has the job already. Most stages have its name.
        moved = moved | {"stage": ""} if moved.get("stage") == record.job else moved
        return "stopping" if record.cancel_requested else progress_text(moved)
    if record.state == "cancelled" and record.cancelled_by:
        return f"by {record.cancelled_by}"
    if record.state == "succeeded":
        size = (shown["result"] or {}).get("size")
        return human_size(size) if isinstance(size, int) else ""
    return _sentence(error)


def held(record: Record) -> str:
    """Return what a queued job waits for before a worker may take it; "" if any free worker may take it."""
    if record.waits_for:
        return f"{record.waits_for} is in use"
    if record.not_before > time.time():
        return f"next try in {human_duration(record.not_before - time.time())}{_after(record)}"
    return ""


def waiting(record: Record) -> str:
    """Return what a queued job waits for, as far as its record says it; "" if the record does not say it."""
    after = _after(record)
    return held(record) or (f"next try when a worker is free{after}" if after else "")


def _after(record: Record) -> str:
    """Return ``, after ERROR`` with the error of the last attempt, or an empty text."""
    last = record.attempts[-1].error if record.attempts else None
    return f", after {_sentence(last)}" if last else ""


def _sentence(error: dict[str, Any]) -> str:
    """Return the class and the problem of an error, without its place and remedy."""
    text = f"{error.get('error', '')}: {error.get('what') or error.get('message') or ''}"
    return text.strip(": ")


def details(record: Record, shown: dict[str, Any], hint: str = "") -> str:
    """Return about ten lines about a job, with the remedy last.

    *shown* is the public JSON. *hint* says why a queued job waits. Without it, the record says so.
    """
    lines = {name: printable(f"{name:{_NAME}} {text}") for name, text in _facts(record, shown, hint) if text}
    lines["state"] = lines["state"].replace(record.state, painted("state", record.state), 1)
    return "\n".join(lines.values())


def _facts(record: Record, shown: dict[str, Any], hint: str) -> Iterator[tuple[str, str]]:
    request, error, result = shown["request"], shown["error"] or {}, shown["result"] or {}
    yield "job", f"{record.job_id} ({record.job})"
    yield "state", f"{record.state} for {since(record)}{_by(record)}"
    name = f'"{request["name"]}"' if request.get("name") else ""
    yield "what", " ".join(filter(None, (str(request.get("kind") or ""), what(request), name)))
    yield "account", account_of(record)
    yield "from", str(request.get("url") or request.get("source") or request.get("vcenter") or "")
    yield "stores", ", ".join(map(str, request.get("stores") or filter(None, [request.get("store")])))
    yield "zone", f"{record.zone}, lane {record.lane}" + (f", priority {record.priority}" if record.priority else "")
    yield "created", f"{iso(record.created)}"
    yield "attempts", _attempts(record)
    if not record.ended:
        yield "progress", progress_text(shown["progress"])
    if record.state == "queued":
        yield "waits", hint or waiting(record)
    yield "result", migration_report(result) or _result(result)
    for each in missing_stores(result):
        yield "missing", each
    if removal := result.get("removal_job"):
        yield "snapshot", f"not removed: `ssvm job {removal}` removes it"
    if record.callback.url and record.callback.state:
        yield "callback", f"{record.callback.state}, {record.callback.tries} tries  {record.callback.error}".rstrip()
    if error:
        yield "error", _sentence(error)
        yield "where", str(error.get("where") or "")
        yield "remedy", _remedy(record, error)


def _by(record: Record) -> str:
    if record.cancelled_by:
        return f", cancelled by {record.cancelled_by}"
    return ", it was asked to stop" if record.cancel_requested and not record.ended else ""


def _attempts(record: Record) -> str:
    if not record.attempts:
        return "none"
    last = record.attempts[-1]
    lasted = f", {human_duration(max(0.0, last.ended - last.started))}" if last.ended else ""
    by = f", retried by {last.by}" if last.by else ""
    where = f" on {last.worker}" + (f" ({last.host})" if last.host and last.host not in last.worker else "")
    moved = f", moved {human_size(last.bytes)}" if last.ended else ""
    return f"{last.number}, the last{where}{lasted}{moved}{by}"


def _result(result: dict[str, Any]) -> str:
    """Return the fields of a result that are one short value."""
    short = {name: each for name, each in result.items() if not isinstance(each, bool | list | dict)}
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, each in short.items() if (text := cell(name, each)))


def _remedy(record: Record, error: dict[str, Any]) -> str:
    remedy = str(error.get("remedy") or "").rstrip(".")
    # A request that has to change is a new job. A retry would fail again.
    if record.state not in ("failed", "cancelled") or "submit the job again" in remedy:
        return remedy
    return f"{remedy}. Then: ssvm retry {record.job_id}" if remedy else f"ssvm retry {record.job_id}"
