"""Identify the version of an HTTP object, and compare answers with it (RFC 9110, 8.8 and 13.1.5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from ssvm_worker.net.http import HttpResponse

#: RFC 9110, 14.4. The unit is matched in any case, with the blanks and the "=" that some servers write.
_CONTENT_RANGE = re.compile(r"bytes[ =:]+([0-9]{1,19}) *- *([0-9]{1,19}) */ *([0-9]{1,19}|\*)", re.IGNORECASE)
_STRONG_ETAG = re.compile(r'"[^"\x00-\x1f\x7f]*"')


@dataclass(frozen=True)
class Validator:
    """Identity of one version of an object. A draft manifest stores it for a later attempt."""

    #: A strong ETag (RFC 9110, 13.1.5), or None.
    etag: str | None
    #: Only if it counts as strong (RFC 9110, 8.8.2.2) and there is no strong ETag.
    last_modified: str | None
    #: Bytes of the complete object.
    size: int

    @property
    def condition(self) -> str:
        """Return the value of If-Range."""
        return self.etag or self.last_modified or ""

    def range(self, start: int, end: int | None = None) -> dict[str, str]:
        """Return the headers that request this version's bytes from *start* up to *end*, *end* excluded."""
        last = "" if end is None else str(end - 1)
        return {"Range": f"bytes={start}-{last}", "If-Range": self.condition}

    def refuse_range(self, answer: HttpResponse, start: int, end: int | None, encoding: str) -> str:
        """Return why a 206 is not exactly this range of this version in this content coding, else ""."""
        end = self.size if end is None else end
        if content_range(answer) not in ((start, end, self.size), (start, end, None)):
            given = answer.headers.get("Content-Range", "none")[:80]
            return f"Asked for the bytes {start}-{end - 1} of {self.size}, the server sent {given!r}"
        if answer.length not in (None, end - start):
            return f"Asked for {end - start} bytes, the server announces {answer.length}"
        # RFC 9110, 15.3.7: a 206 has the ETag that a 200 would have. It may omit Last-Modified.
        if self.etag is not None and strong_etag(answer) != self.etag:
            return self._other_etag(answer)
        if self.etag is None and answer.headers.get("Last-Modified") not in (None, self.last_modified):
            return "The object has changed since the download began"
        return _other_coding(answer, encoding)

    def refuse_whole(self, answer: HttpResponse, encoding: str) -> str:
        """Return why a 200 is not this version in this content coding, else ""."""
        if self.etag is not None and strong_etag(answer) != self.etag:
            return self._other_etag(answer)
        if self.etag is None and strong_date(answer) != self.last_modified:
            return "The object has changed since the download began"
        if answer.length not in (None, self.size):
            return f"The object had {self.size} bytes, now the server announces {answer.length}"
        return _other_coding(answer, encoding)

    def _other_etag(self, answer: HttpResponse) -> str:
        return f"The object's ETag was {self.etag}, now it is {answer.headers.get('ETag')}"


def content_range(answer: HttpResponse) -> tuple[int, int, int | None] | None:
    """Return start, end (excluded) and total (None: unknown) of the one range in a 206, or None if it is unclear."""
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
    if match is None or answer.headers.get("Content-Type", "").lower().startswith("multipart/byteranges"):
        return None
    return int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])


def content_coding(answer: HttpResponse) -> str:
    """Return the Content-Encoding, or "" for none and for identity."""
    coding = answer.headers.get("Content-Encoding", "").strip().lower()
    return "" if coding == "identity" else coding


def _other_coding(answer: HttpResponse, encoding: str) -> str:
    if (given := content_coding(answer)) == encoding:
        return ""
    return f"The object's Content-Encoding was {encoding or 'none'}, now it is {given or 'none'}"


def strong_etag(answer: HttpResponse) -> str | None:
    """Return the ETag, or None for a weak or an invalid one."""
    etag = answer.headers.get("ETag", "").strip()
    return etag if _STRONG_ETAG.fullmatch(etag) else None


def strong_date(answer: HttpResponse) -> str | None:
    """Return Last-Modified if it is at least a second older than the answer, else None."""
    modified, made = answer.headers.get("Last-Modified"), answer.headers.get("Date")
    try:
        if modified and made and (_date(made) - _date(modified)).total_seconds() >= 1:
            return modified
    except (ValueError, TypeError, OverflowError):  # not a date
        pass
    return None


def _date(text: str) -> datetime:
    """Parse any of the three forms of RFC 9110, 5.6.7. The form of asctime has no zone and means UTC."""
    date = parsedate_to_datetime(text)
    return date if date.tzinfo else date.replace(tzinfo=UTC)
