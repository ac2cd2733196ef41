"""What tells one state of an http object from another (RFC 9110, 8.8 and 13.1.5), and the ranges of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from ssvm_worker.errors import SourceChanged

from .exchange import Exchange

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_AGAIN = "Ask again, to start from the first byte"


@dataclass(frozen=True)
class Validator:
    """Kept in a draft manifest; a later attempt goes on with it."""

    #: A strong one only (RFC 9110, 13.1.5).
    etag: str | None
    #: Only where it counts as strong (RFC 9110, 8.8.2.2) and there is no strong ETag.
    last_modified: str | None
    #: Bytes of the whole object.
    size: int

    @property
    def condition(self) -> str:
        """The value of If-Range."""
        return self.etag or self.last_modified or ""

    def range(self, start: int, end: int | None = None) -> dict[str, str]:
        """The headers that ask for the bytes from *start* up to but not including *end*, of this very object."""
        last = "" if end is None else str(end - 1)
        return {"Range": f"bytes={start}-{last}", "If-Range": self.condition}

    def match_range(self, answer: Exchange, start: int, end: int | None, where: str) -> None:
        """Raise SourceChanged unless a 206 holds just that range of this object."""
        given = answer.headers.get("Content-Range", "none")
        match = _CONTENT_RANGE.fullmatch(given)
        if not match or tuple(map(int, match.groups())) != (start, (end or self.size) - 1, self.size):
            asked = f"Asked for the bytes from {start} on of {self.size}"
            raise SourceChanged(f"{asked}, the server gave {given[:80]!r}", where, _AGAIN)
        if (etag := answer.headers.get("ETag")) and self.etag not in (None, etag):
            raise SourceChanged(f"The object's ETag was {self.etag}, now it is {etag}", where, _AGAIN)


def strong_etag(answer: Exchange) -> str | None:
    """The ETag, unless it is a weak one."""
    etag = answer.headers.get("ETag", "").strip()
    return etag if etag.startswith('"') else None


def strong_date(answer: Exchange) -> str | None:
    """Last-Modified, if it lies a second or more before the answer was made."""
    modified, made = answer.headers.get("Last-Modified"), answer.headers.get("Date")
    try:
        if modified and made and (parsedate_to_datetime(made) - parsedate_to_datetime(modified)).total_seconds() >= 1:
            return modified
    except (ValueError, TypeError):  # no date; or one of them without a zone
        pass
    return None
