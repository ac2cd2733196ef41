"""Conditional and range requests by RFC 9110, sections 13 and 14. The decision needs only the headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime

_RANGE = re.compile(r"bytes=\s*(\d*)-(\d*)\s*")
_TAG = re.compile(r'(?:W/)?"[^"]*"')


@dataclass(frozen=True)
class ObjectVersion:
    """The version of the object that is served."""

    #: Quoted, strong.
    etag: str
    size: int
    #: Seconds since the epoch.
    modified: int

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that identify this version."""
        return {"ETag": self.etag, "Last-Modified": formatdate(self.modified, usegmt=True)}


@dataclass(frozen=True)
class ConditionalAnswer:
    """The status of the answer. 200 and 206 have the range of bytes to send; 304, 412 and 416 have none."""

    status: int
    offset: int = 0
    count: int = 0


def answer(method: str, headers: Mapping[str, str], version: ObjectVersion) -> ConditionalAnswer:
    """Return the answer to a GET or HEAD. *headers* have lower-case names."""
    if status := _precondition(headers, version):
        return ConditionalAnswer(status)
    if method == "GET" and "range" in headers and _is_current(headers.get("if-range"), version):
        # The answer to one range. Several ranges, another unit and malformed ranges get the complete object, as
        # section 14.2 allows.
        text = headers["range"]
        match = _RANGE.fullmatch(text)
        if not match or match.groups() == ("", ""):
            return ConditionalAnswer(200, 0, version.size)
        first, last = (int(each[:19]) if each else None for each in match.groups())  # no size has more digits
        if first is None:
            first, last = max(version.size - (last or 0), 0), None
        elif last is not None and last < first:
            return ConditionalAnswer(200, 0, version.size)
        end = version.size if last is None else min(last + 1, version.size)
        return ConditionalAnswer(206, first, end - first) if first < end else ConditionalAnswer(416)
    return ConditionalAnswer(200, 0, version.size)


def _precondition(headers: Mapping[str, str], version: ObjectVersion) -> int:
    """Return 412 or 304, or 0 if all preconditions hold. The order is that of section 13.2.2."""
    if "if-match" in headers:
        if not _matches(headers["if-match"], version.etag, weak=False):
            return 412
    elif (limit := _date(headers.get("if-unmodified-since"))) is not None and version.modified > limit:
        return 412
    if "if-none-match" in headers:
        return 304 if _matches(headers["if-none-match"], version.etag, weak=True) else 0
    limit = _date(headers.get("if-modified-since"))
    return 304 if limit is not None and version.modified <= limit else 0


def _matches(etags: str, etag: str, *, weak: bool) -> bool:
    if etags.strip() == "*":
        return True
    return any(etag == (each.removeprefix("W/") if weak else each) for each in _TAG.findall(etags))


def _is_current(if_range: str | None, version: ObjectVersion) -> bool:
    """Return whether the client's parts are of this version: its If-Range has the same tag or the same date."""
    if if_range is None:
        return True
    return if_range.strip() == version.etag or _date(if_range) == version.modified


def _date(text: str | None) -> int | None:
    """Return seconds since the epoch, or None if *text* is not a date."""
    try:
        return int(parsedate_to_datetime(text).timestamp()) if text else None
    except (ValueError, TypeError, OverflowError):
        return None
