"""Read the head and the chunks of an HTTP response by the rules of RFC 9110 and 9112, within limits.

``http.client`` has three weaknesses. It treats 102 and 103 as the final response. It skips any number of 100 responses
and trailers. It accepts any length.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead, RemoteDisconnected
from typing import Any

from ssvm_worker.units import KiB

#: The maximum of interim responses before the final one. RFC 9110, section 15.2 allows any number. Real servers send
#: one or two.
MOST_INTERIM = 16
#: The maximum of bytes in all heads of one response, including interim ones. The limit of curl is 300 KiB.
_MAX_HEAD = 256 * KiB
#: The maximum of fields in one head.
_MAX_FIELDS = 200
#: The maximum of bytes in the trailers after the last chunk.
_MAX_TRAILERS = 64 * KiB
#: The maximum of bytes in sizes and extensions of chunks that the data does not justify. Go's net/http has the same.
_MAX_EXCESS = 16 * KiB
_STATUS = re.compile(r"HTTP/1\.(\d)[ \t]+(\d{3})(?:[ \t]+(.*))?", re.DOTALL)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_CHUNK = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r?\n", re.DOTALL)


class HttpAnswer(HTTPResponse):
    """Response of a connection over a ``WatchedSocket``, used as its ``response_class``.

    The head must arrive within the stall time of the socket's watch, even if bytes move. The response to a PUT or POST
    gets this time again after each interim response: 102 means that the server still processes the body.
    Raises HTTPException if the peer does not send HTTP. Raises RemoteDisconnected if the connection ends in the head.
    """

    def __init__(self, sock: Any, method: str | None = None, read_ahead: int = 8 * KiB) -> None:
        super().__init__(sock, method=method)
        self.fp.close()
        self.fp = sock.makefile("rb", read_ahead)
        self._request_method = method
        self._watch = sock.watch
        self._left = _MAX_HEAD
        self._excess = 0

    def begin(self) -> None:
        """Read the head of the final response."""
        if self.headers is None:
            self._read_head()

    def _read_head(self) -> None:
        self._watch.deadline = time.monotonic() + self._watch.stall_s
        try:
            for _ in range(MOST_INTERIM + 1):
                self._read_status_line()
                fields = self._read_fields()
                if not 100 <= self.status < 200:
                    self.headers = self.msg = fields
                    self._frame()
                    return
                if self.status == 101:
                    raise HTTPException("The server switches to another protocol without a request for it")
                if self._request_method in ("PUT", "POST"):
                    self._watch.deadline = time.monotonic() + self._watch.stall_s
        finally:
            self._watch.deadline = math.inf
        raise HTTPException(f"More than {MOST_INTERIM} interim responses came before the final one")

    def _read_status_line(self) -> None:
        line = self._read_line()
        if not line:
            raise RemoteDisconnected("The connection ended without a response")
        match = _STATUS.fullmatch(line.decode("latin-1").rstrip("\r\n"))
        if match is None or int(match[2]) < 100:
            raise HTTPException(f"The response does not start like HTTP/1: {line[:60]!r}")
        self.version = 10 if match[1] == "0" else 11
        self.code = self.status = int(match[2])
        self.reason = (match[3] or "").strip()

    def _read_fields(self) -> HTTPMessage:
        """Read the fields of a head. Join folded lines and skip invalid lines (RFC 9112, sections 5.1 and 5.2)."""
        fields: list[list[str]] = []
        is_field = False
        while (line := self._read_line()) not in (b"\r\n", b"\n"):
            if not line:
                raise RemoteDisconnected("The connection ended in the head of the response")
            text = _CONTROL.sub(" ", line.decode("latin-1")).rstrip()
            if text[:1] in (" ", "\t"):
                if is_field:
                    fields[-1][1] = f"{fields[-1][1]} {text.strip()}".strip()
                continue
            name, colon, value = text.partition(":")
            is_field = bool(colon and _TOKEN.fullmatch(name.rstrip()))
            if is_field:
                fields.append([name.rstrip(), value.strip()])
            if len(fields) > _MAX_FIELDS:
                raise HTTPException(f"The head of the response has more than {_MAX_FIELDS} fields")
        message = HTTPMessage()
        for name, value in fields:
            message[name] = value
        return message

    def _read_line(self) -> bytes:
        line = self.fp.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise HTTPException(f"The head of the response has more than {_MAX_HEAD} bytes")
        return line

    def _frame(self) -> None:
        """Determine where the body ends (RFC 9112, section 6.3)."""
        codings = [each for each in _listed(self.headers, "Transfer-Encoding") if each != "identity"]
        tunnel = self._request_method == "CONNECT" and self.status < 300
        self.chunked, self.chunk_left, self.length = False, None, None
        if tunnel or self._request_method == "HEAD" or self.status in (204, 304):
            self.length = 0
        elif codings == ["chunked"]:
            self.chunked = True
        elif codings:
            raise HTTPException(f"The body has an unknown Transfer-Encoding: {', '.join(codings)[:80]!r}")
        else:
            self.length = content_length(self.headers)
        options = ",".join(_listed(self.headers, "Connection"))
        closes = "close" in options or (self.version == 10 and "keep-alive" not in options)
        self.will_close = closes or (not self.chunked and self.length is None)

    # http.client calls the next two methods for the chunks of a body.

    def _read_next_chunk_size(self) -> int:
        line = self.fp.readline(_MAX_EXCESS + 1)
        if not line:
            raise IncompleteRead(b"")
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise HTTPException(f"Invalid size of a chunk: {line[:40]!r}")
        size = int(match[1], 16)
        self._excess = max(0, self._excess + len(line) - 16 - 2 * size)
        if self._excess > _MAX_EXCESS:
            raise HTTPException("The chunks have far more extensions than data")
        return size

    def _read_and_discard_trailer(self) -> None:
        left = _MAX_TRAILERS
        self._watch.deadline = time.monotonic() + self._watch.stall_s
        try:
            while (line := self.fp.readline(left + 1)) not in (b"\r\n", b"\n", b""):
                left -= len(line)
                if left < 0:
                    raise HTTPException(f"The trailers after the body have more than {_MAX_TRAILERS} bytes")
        finally:
            self._watch.deadline = math.inf


def content_length(headers: HTTPMessage) -> int | None:
    """Return the Content-Length or None. Several equal values count as one (RFC 9110, section 8.6).

    Raises HTTPException for an invalid value and for different values.
    """
    values = set(_listed(headers, "Content-Length"))
    if not values:
        return None
    value = values.pop()
    # No file system holds a size of 19 digits. Python itself refuses int() of thousands of digits.
    if values or not re.fullmatch(r"[0-9]{1,19}", value):
        raise HTTPException(f"Invalid Content-Length: {headers.get('Content-Length', '')[:80]!r}")
    return int(value)


def wait_wanted(headers: Mapping[str, str] | HTTPMessage) -> float:
    """Return the seconds of Retry-After, which is a number or a date (RFC 9110, section 10.2.3).

    Returns 0 if the field is missing or invalid.
    """
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        retry_at, now = parsedate_to_datetime(text), parsedate_to_datetime(headers["Date"])
        return max(0.0, (retry_at - now).total_seconds())
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0.0


def _listed(headers: HTTPMessage, name: str) -> list[str]:
    """Return the members of a list field in lower case, from all its lines (RFC 9110, section 5.6.1)."""
    members = ",".join(headers.get_all(name) or []).split(",")
    return [member.strip().lower() for member in members if member.strip()]
