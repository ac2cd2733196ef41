"""The list of jobs: the filters in a page's URL, and the jobs that they select."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from typing import Any
from urllib.parse import urlencode

from ssvm_worker.cli import job_text
from ssvm_worker.config.schema import LANES, Settings
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.jobs import JOBS
from ssvm_worker.ledger.job_filter import JobFilter, account_of
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import INBOUND, STATES, Record
from ssvm_worker.operations.health import idle
from ssvm_worker.units import parse_duration
from ssvm_worker.wiring.assembly import shown

from .job_view import JobView, summary

#: The number of jobs on a page, and the number of newest jobs among which a page is sorted.
_PAGE, _SORTED = 50, 2000
_NAMES = ("state", "zone", "lane", "job", "account", "error", "since", "until", "q", "sort", "page")
#: The columns that a user can sort by, with their keys. Without one, the newest jobs are first.
_KEYS: dict[str, Callable[[Record], Any]] = {
    "id": lambda record: record.job_id,
    "job": lambda record: (record.job, job_text.what(record.request)),
    "state": lambda record: (record.state, str((record.error or {}).get("error") or "")),
    "zone": lambda record: (record.zone, record.lane),
    "account": account_of,
    "changed": lambda record: -record.updated,
    "created": lambda record: record.created,
}


@dataclass(frozen=True)
class JobQuery:
    """The filters, the order and the number of a page."""

    #: The values of the URL that are not empty.
    given: Mapping[str, str]
    wanted: JobFilter
    #: The text of the search, in lower case.
    text: str = ""
    #: The number of the page, from 1.
    page: int = 1

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> JobQuery:
        """Return the query of a URL. Raise InvalidRequest for a value that no job can have."""
        given = {name: value for name in _NAMES if (value := values.get(name, "").strip())}
        for name, known in (("state", STATES), ("sort", [sign + key for key in _KEYS for sign in ("", "-")])):
            if given.get(name) not in (None, *known):
                raise InvalidRequest(f"There is no {name} {given[name]!r}", "", f"There are: {', '.join(known)}")
        page = given.get("page", "1")
        if not (page.isascii() and page.isdecimal() and len(page) < 7 and int(page)):
            raise InvalidRequest("Invalid page", page, "Give a number from 1")
        wanted = JobFilter(
            states=(given["state"],) if "state" in given else STATES,
            **{name: given.get(name) for name in ("zone", "lane", "job", "account", "error")},
            since=_moment(given["since"]) if "since" in given else 0.0,
            until=_moment(given["until"]) if "until" in given else float("inf"),
        )
        return cls(given, wanted, given.get("q", "").lower(), int(page))

    def find(self, ledger: Ledger) -> Iterator[Record]:
        """Yield the jobs that match, newest first."""
        return (record for record in ledger.find(self.wanted) if not self.text or self.text in _searched(record))

    def link(self, **changes: str) -> str:
        """Return the query part of the URL with *changes*. A change of anything but the page leads to page 1."""
        values = {**self.given, **({"page": ""} | changes)}
        text = urlencode({name: value for name, value in values.items() if value})
        return f"?{text}" if text else "?"

    def sort_link(self, key: str) -> str:
        """Return the query part of the URL that sorts by a column. A second click reverses the order."""
        return self.link(sort=f"-{key}" if self.given.get("sort") == key else key)

    def sort_sign(self, key: str) -> str:
        """Return the ``aria-sort`` of a column."""
        return {key: "ascending", f"-{key}": "descending"}.get(self.given.get("sort", ""), "none")

    @property
    def is_filtered(self) -> bool:
        """Return whether the query excludes any job."""
        return bool(self.given.keys() - {"sort", "page"})


def list_jobs(ledger: Ledger, settings: Settings, query: JobQuery) -> dict[str, Any]:
    """Return the values of the page: its jobs, the number of jobs by state, and whether there are other pages."""
    start = (query.page - 1) * _PAGE
    found, sort = query.find(ledger), query.given.get("sort", "")
    note = ""
    if sort:
        newest = list(islice(found, _SORTED + 1))
        note = f"Sorted among the newest {_SORTED} jobs that match." if len(newest) > _SORTED else ""
        key = _KEYS[sort.removeprefix("-")]
        found = iter(sorted(newest[:_SORTED], key=key, reverse=sort.startswith("-")))
    records = list(islice(found, start, start + _PAGE + 1))
    idle_once = cache(lambda zone, lane: idle(settings, zone, lane))
    hints = [idle_once(each.zone, each.lane) if each.state == "queued" else "" for each in records[:_PAGE]]
    counts = ledger.counts()
    return {
        "jobs": [JobView(**summary(each, hint)) for each, hint in zip(records, hints, strict=False)],
        "query": query,
        "counts": {name: counts[name] for name in STATES},
        "first": start + 1,
        "has_more": len(records) > _PAGE,
        "note": note,
        "choices": {"lane": [*LANES, INBOUND], "job": sorted(JOBS)},
    }


def _searched(record: Record) -> str:
    """Return the text of a job that a search examines. It contains no secret."""
    request = shown(record)["request"]
    parts = [record.job_id, record.job, job_text.what(request), str((record.error or {}).get("message") or "")]
    parts += [str(request.get(name) or "") for name in ("name", "url", "source", "vm", "vcenter")]
    parts += [record.attempts[-1].worker, record.attempts[-1].host] if record.attempts else []
    return "\n".join(parts).lower()


def _moment(text: str) -> float:
    """Return a time in seconds since the epoch. The text is ISO 8601 in UTC, or a duration before now."""
    with contextlib.suppress(ValueError):
        return time.time() - parse_duration(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest("Invalid time", text, "Give 2h or 2026-01-31T18:00Z") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
