"""Conditional and range requests as RFC 9110 has them (sections 13 and 14), decided from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime

_RANGE = re.compile(r"bytes=\s*(\d*)-(\d*)\s*")
_TAG = re.compile(r'(?:W/)?"[^"]*"')


@dataclass(frozen=True)
class ObjectVersion:
    """The one state of the object that is offered."""

    #: Quoted, strong.
    etag: str
    size: int
    #: Seconds since the epoch.
    modified: int

    @property
    def headers(self) -> dict[str, str]:
        """What tells it from any other."""
        return {"ETag": self.etag, "Last-Modified": formatdate(self.modified, usegmt=True)}


@dataclass(frozen=True)
class Answer:
    """200 and 206 with the bytes to send; 304, 412 and 416 with none."""

    status: int
    offset: int = 0
    count: int = 0


def answer(method: str, headers: Mapping[str, str], version: ObjectVersion) -> Answer:
    """What a GET or HEAD is answered. *headers* have lower-case names."""
    if status := _refused(headers, version):
        return Answer(status)
    if method == "GET" and "range" in headers and _same(headers.get("if-range"), version):
        return _ranged(headers["range"], version.size)
    return Answer(200, 0, version.size)


def _refused(headers: Mapping[str, str], version: ObjectVersion) -> int:
    """412 or 304, else 0; in the order of section 13.2.2."""
    if "if-match" in headers:
        if not _matches(headers["if-match"], version.etag, weak=False):
            return 412
    elif (limit := _date(headers.get("if-unmodified-since"))) is not None and version.modified > limit:
        return 412
    if "if-none-match" in headers:
        return 304 if _matches(headers["if-none-match"], version.etag, weak=True) else 0
    limit = _date(headers.get("if-modified-since"))
    return 304 if limit is not None and version.modified <= limit else 0


def _matches(given: str, etag: str, *, weak: bool) -> bool:
    if given.strip() == "*":
        return True
    return any(etag == (each.removeprefix("W/") if weak else each) for each in _TAG.findall(given))


def _same(if_range: str | None, version: ObjectVersion) -> bool:
    """Whether a part may be joined to the parts that the client has: the tag, or the very date, is the same."""
    if if_range is None:
        return True
    return if_range.strip() == version.etag or _date(if_range) == version.modified


def _ranged(given: str, size: int) -> Answer:
    """One range; several at once, another unit and nonsense are answered with the whole, as section 14.2 allows."""
    match = _RANGE.fullmatch(given)
    if not match or match.groups() == ("", ""):
        return Answer(200, 0, size)
    first, last = (int(each[:19]) if each else None for each in match.groups())  # no file has more digits
    if first is None:
        first, last = max(size - (last or 0), 0), None
    elif last is not None and last < first:
        return Answer(200, 0, size)
    end = size if last is None else min(last + 1, size)
    return Answer(206, first, end - first) if first < end else Answer(416)


def _date(text: str | None) -> int | None:
    """Seconds since the epoch, or None for what is no date."""
    try:
        return int(parsedate_to_datetime(text).timestamp()) if text else None
    except (ValueError, TypeError, OverflowError):
        return None
