"""The HTTP client: sessions of requests over connections that obey the address rule, detect stalls and end at a cancel.

``HttpAnswer`` reads the head and the chunks of a response by the rules of RFC 9110 and 9112, within limits.
``http.client`` has three weaknesses. It treats 102 and 103 as the final response. It skips any number of 100 responses
and trailers. It accepts any length.

A session sends URLs and headers as they are given, and returns bodies as the server sent them. It follows no redirect,
stores no cookie, and decodes nothing. It reads neither the environment nor ``.netrc``.

Methods raise OSErrors such as ``AddressRefused``, ``Stalled`` and ``PinMismatch``. They raise HTTPException for a peer
that breaks the rules of HTTP, and the errors of *check*. The adapters above translate these errors.
"""

from __future__ import annotations

import math
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead, RemoteDisconnected
from typing import Any, cast

from requests import PreparedRequest, Response, Session
from requests.adapters import BaseAdapter
from requests.cookies import RequestsCookieJar
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError

from ssvm_worker import __version__
from ssvm_worker.errors import SourceDenied, SourceUnavailable
from ssvm_worker.units import KiB

from .address_policy import AddressRule
from .proxy import Proxy, refuse_address
from .sockets import FILL_S, TICK, Check, ConnectOptions, StallWatch, WatchedSocket, WatchedTLSSocket, connect, secure
from .tls import tls_context
from .urls import WebUrl

#: The head of an interim answer. After 101 HTTP ends, so 101 does not count (RFC 9110, 15.2).
_INTERIM = re.compile(rb"HTTP/1\.\d +1(?!01)\d\d[ \r\n].*?\n\r?\n", re.DOTALL)
_INTERIM_BEGINS = re.compile(rb"HTTP/1\.\d +1(?!01)\d\d")
#: Bytes of a status line up to the end of its code.
_STATUS_LENGTH = len("HTTP/1.1 100")
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


@dataclass(frozen=True)
class HttpOptions:
    """Limits and trust of the connections to one origin."""

    #: None: any address.
    rule: AddressRule | None = field(default_factory=AddressRule)
    #: Seconds to connect, without the time of name resolution.
    connect_timeout_s: float = 10.0
    #: Seconds without a byte, or with fewer than *min_rate* bytes per second, after which the transfer has stalled. The
    #: head of a response has the same limit.
    stall_s: float = 60.0
    min_rate: float = 1024.0
    #: PEM file of certificate authorities to trust in addition to those of the system.
    ca_file: str | None = None
    #: The same for the origin of the caller's URL only, and the client certificate for this origin (with its key).
    origin_ca_file: str | None = None
    certificate: str | None = None
    proxy: Proxy | None = None
    #: A TLS context to use instead of one from the files above.
    tls: ssl.SSLContext | None = None
    #: The thumbprint of the server's certificate.
    pin: str | None = None
    #: Bytes to read ahead from the socket. More than the default is faster for bodies in many small HTTP chunks. The
    #: connection must close after the response, or a read may wait for bytes that never come.
    read_ahead: int = 8 * KiB

    @cached_property
    def context(self) -> ssl.SSLContext:
        """Return the TLS context. It loads the files once, because those of the system take 20 ms of CPU time."""
        return self.tls or tls_context(self.ca_file, self.origin_ca_file, certificate=self.certificate)


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
        self._body_error: OSError | IncompleteRead | None = None

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

    # http.client calls the next three methods for the chunks of a body.

    def _read_chunked(self, amt: int | None = None) -> bytes:
        """Read some bytes. After FILL_S, begin no further chunk of HTTP: a slow server must not delay the first ones.

        If the server stalls earlier, the first chunks wait for the end of the stall. Keep the end of the connection
        after whole chunks for the next call: it loses no bytes.
        """
        if self._body_error is not None:
            raise self._body_error
        parts: list[bytes] = []
        until = math.inf if amt is None else time.monotonic() + FILL_S
        try:
            while amt != 0 and (not parts or time.monotonic() < until) and (left := self._get_chunk_left()):  # type: ignore[attr-defined]
                size = left if amt is None else min(amt, left)
                parts.append(self._safe_read(size))  # type: ignore[attr-defined]
                self.chunk_left = left - size
                amt = None if amt is None else amt - size
        except (OSError, IncompleteRead) as error:
            if not parts:
                raise
            self._body_error = error
        return b"".join(parts)

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


class HttpResponse(Response):
    """Response whose head was read. Its body is still on the connection. The owner must call ``close``."""

    def __init__(self, request: HttpRequest, adapter: WatchedAdapter, raw: Any) -> None:
        super().__init__()
        self.request = request
        self.web_url, self.url = request.web_url, request.web_url.name
        self.status_code, self.reason, self.raw = raw.status, raw.reason, raw
        self.headers = CaseInsensitiveDict(raw.headers)
        #: Bytes of the body, or None if the server does not announce them.
        self.length: int | None = raw.length_remaining
        self.adapter = adapter
        # read1 returns the bytes that have arrived, so a reset does not lose them. From a chunked body it returns
        # each chunk separately, and these may be tiny.
        self._read = raw.read if raw.chunked else raw.read1
        #: The socket, if only its end marks the end of the body: there is no length and no last chunk.
        self._ends_with = adapter.socket if self.length is None and not raw.chunked else None

    def read(self, size: int) -> bytes:
        """Return at most *size* bytes of the body, or b"" at its end.

        Raises HTTPException if the body is shorter than its Content-Length, or has no last chunk. Raises an OSError if
        the body ends with the connection, and TLS has not signed this end.
        """
        with _unwrapped():
            data: bytes = self._read(size, decode_content=False)
        if not data and self._ends_with and not self._ends_with.ended:
            raise ConnectionError("The bytes ended, but not the connection")
        return data

    @property
    def starved(self) -> float:
        """Return the seconds that reads have waited for bytes since the connection was made."""
        return self.adapter.socket.watch.starved if self.adapter.socket else 0.0

    def close(self) -> None:
        """Close the connection, and drop the unread rest of the body."""
        self.raw.close()
        self.adapter.close()


class HttpRequest(PreparedRequest):
    """Request with exactly these headers. requests would quote the URL again, which breaks presigned URLs."""

    def __init__(self, method: str, url: WebUrl, headers: Mapping[str, str], body: bytes | None = None) -> None:
        super().__init__()
        self.method, self.body, self.web_url = method, body, url
        self.url = f"{url.scheme}://{url.authority}{url.target}"
        self.headers = CaseInsensitiveDict(headers)


class WatchedAdapter(BaseAdapter):
    """Transport adapter with one connection.

    It connects at the first request, after the server has closed the connection, and for another origin.
    """

    def __init__(self, options: HttpOptions, check: Check, *, keep: bool = False, node: str = "") -> None:
        """Store the options without connecting.

        *keep*: ask the server to keep the connection open for another request after each complete response.
        *node*: the address to connect to first if the name has several.
        """
        super().__init__()
        self.options = options
        #: Called in every wait. A new owner of the connection sets its own check.
        self.check = check
        #: The address of the connection. It is empty before the connection, and behind a proxy.
        self.node = node
        #: The socket of the last request. http.client drops it if the connection closes with the body.
        self.socket: WatchedSocket | None = None
        self._keep = keep
        self._connection: HTTPConnection | None = None
        self._origin = ("", "", 0)

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> HttpResponse:  # noqa: ARG002 - see HttpOptions
        """Send the request and read the head of the final response."""
        assert isinstance(request, HttpRequest)
        used = self._connection is not None and self._connection.sock is not None
        try:
            return self._exchange(request)
        except (HTTPException, ConnectionError):
            if not used or request.method != "GET":
                raise
        # A server may close an idle connection at the moment of the next request. So try once more.
        return self._exchange(request)

    def _exchange(self, request: HttpRequest) -> HttpResponse:
        self.start(request)
        return self.receive(request)

    def start(self, request: HttpRequest) -> HTTPConnection:
        """Send the head of the request, and its body if it has one. Return the connection, for more of the body."""
        with self._closing_on_error():
            if self._connection is None or self._connection.sock is None or self._origin != request.web_url.origin:
                self.close()
                connection = HTTPConnection(request.web_url.host, request.web_url.port, timeout=TICK)
                # With the socket given here, urllib3 never opens an unchecked socket, nor does it use its own TLS.
                connection.auto_open = 0
                connection.response_class = partial(HttpAnswer, read_ahead=self.options.read_ahead)  # type: ignore[assignment]
                connection.sock = self.socket = self._open_socket(request.web_url)
                self._connection, self._origin = connection, request.web_url.origin
            self._connection.request(
                request.method or "",
                self._target(request.web_url),
                body=cast("bytes | None", request.body),
                headers=self._all_headers(request),
                preload_content=False,
                decode_content=False,
            )
            return self._connection

    def receive(self, request: HttpRequest) -> HttpResponse:
        """Read the head of the final response."""
        with self._closing_on_error():
            assert self._connection is not None
            return HttpResponse(request, self, self._connection.getresponse())

    def close(self) -> None:
        """Close the connection if there is one. Further calls have no effect."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            with _unwrapped():
                yield
        except BaseException:
            self.close()
            raise

    def _proxy_for(self, url: WebUrl) -> Proxy | None:
        proxy = self.options.proxy
        return proxy if proxy and proxy.serves(url.host) else None

    def _target(self, url: WebUrl) -> str:
        """Return the request target. It is absolute for a proxy without a tunnel."""
        return f"http://{url.authority}{url.target}" if self._proxy_for(url) and url.scheme == "http" else url.target

    def _all_headers(self, request: HttpRequest) -> dict[str, str]:
        url, headers = request.web_url, cast("Mapping[str, str]", request.headers)
        fixed = {"Host": url.authority, "Accept-Encoding": "identity"}
        fixed |= {} if self._keep else {"Connection": "close"}
        proxy = self._proxy_for(url)
        fixed |= proxy.headers if proxy and url.scheme == "http" else {}
        agent = {} if "User-Agent" in headers else {"User-Agent": f"ssvm-worker/{__version__}"}
        return {**agent, **headers, **fixed}

    def _open_socket(self, url: WebUrl) -> WatchedSocket | WatchedTLSSocket:
        options = self.options
        tls = options.context if url.scheme == "https" else None
        watch = StallWatch(lambda: self.check(), options.stall_s, options.min_rate)
        direct = ConnectOptions(options.rule, options.connect_timeout_s, tls, self.node, options.pin)
        proxy = self._proxy_for(url)
        if proxy is None:
            sock = connect(url.host, url.port, direct, watch)
            self.node = sock.getpeername()[0]
            return sock
        refuse_address(url, options.rule)
        plain = connect(proxy.host, proxy.port, ConnectOptions(options.rule, options.connect_timeout_s), watch)
        assert isinstance(plain, WatchedSocket)
        if tls is None:
            return plain
        try:
            tunnel(plain, url, proxy)
        except BaseException:
            plain.close()
            raise
        return secure(plain, url.host, tls, options.pin)


class _NoCookies(RequestsCookieJar):
    """Jar that ignores the cookies of responses."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Store nothing."""


class HttpSession(Session):
    """Session with one connection at a time. Threads must not share it."""

    def __init__(
        self,
        options: HttpOptions,
        check: Check = lambda: None,
        *,
        keep: bool = False,
        node: str = "",
    ) -> None:
        """Store the options without connecting. They are those of ``WatchedAdapter``."""
        super().__init__()
        self.trust_env = False  # neither proxies, nor authorities, nor passwords from the environment or .netrc
        self.cookies = _NoCookies()
        self.adapter = WatchedAdapter(options, check, keep=keep, node=node)
        self.adapters.clear()
        self.mount("http://", self.adapter)
        self.mount("https://", self.adapter)

    def get_redirect_target(self, resp: Response) -> None:
        """Return None, so that requests does not read the body of a redirect. It has no limit."""

    def exchange(self, method: str, url: WebUrl, headers: Mapping[str, str], body: bytes | None = None) -> HttpResponse:
        """Send a request and read the head of the final response, which may be a redirect."""
        response = self.send(HttpRequest(method, url, headers, body), stream=True, allow_redirects=False)
        assert isinstance(response, HttpResponse)
        return response


class HttpUpload:
    """Request whose body is sent in pieces. Its size is known. No other request uses its connection."""

    def __init__(self, session: HttpSession, method: str, url: WebUrl, headers: Mapping[str, str], size: int) -> None:
        """Connect and send the head."""
        self.sent = 0
        self._adapter = session.adapter
        self._request = HttpRequest(method, url, {**headers, "Content-Length": str(size)})
        self._connection = self._adapter.start(self._request)
        self._interim = 0

    def send(self, piece: bytes) -> HttpResponse | None:
        """Send a piece of the body. Return a final response that has arrived before all of it was sent, else None."""
        self.sent += len(piece)
        if self._has_answer():
            return self.finish()
        try:
            self._connection.send(piece)
        except OSError:
            # A server that refuses a body answers and closes. Its answer is more precise than the broken pipe.
            with suppress(OSError, HTTPException):
                return self.finish()
            raise
        return None

    def finish(self) -> HttpResponse:
        """Read the head of the final response."""
        return self._adapter.receive(self._request)

    def _has_answer(self) -> bool:
        """Drop interim answers, which a server may send before the body. Return whether a final answer has arrived."""
        sock = self._adapter.socket
        assert sock is not None
        while (seen := sock.peek()) is not None:
            interim = _INTERIM.match(seen)
            if interim is None:
                is_begun = _INTERIM_BEGINS.match(seen) or len(seen) < _STATUS_LENGTH
                return not (seen and is_begun and len(seen) < 64 * KiB)
            self._interim += 1
            if self._interim > MOST_INTERIM:
                return True
            sock.skip(interim.end())
        return False


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the error below an error of urllib3. Raise HTTPException for its errors about HTTP.

    http.client and urllib3 raise ValueError and UnicodeError for some numbers and names of a hostile server.
    """
    try:
        yield
    except (OSError, HTTPException):
        raise
    except HTTPError as error:
        cause = error.__cause__
        raise cause if isinstance(cause, OSError | HTTPException) else HTTPException(str(error)) from None
    except ValueError as error:
        raise HTTPException(str(error)) from error


def tunnel(sock: WatchedSocket, url: WebUrl, proxy: Proxy) -> None:
    """Ask the proxy on *sock* for a tunnel to the host of *url*.

    Raises SourceDenied, SourceUnavailable, and the errors of the socket.
    """
    host = f"[{url.host}]" if ":" in url.host else url.host
    lines = [f"CONNECT {host}:{url.port} HTTP/1.1", f"Host: {host}:{url.port}"]
    lines += [f"{name}: {value}" for name, value in proxy.headers.items()]
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("ascii"))
    answer = HttpAnswer(sock, method="CONNECT")
    answer.begin()
    answer.close()
    if answer.status in (403, 407):
        what = f"The proxy {proxy.host} refused the connection (status {answer.status})"
        raise SourceDenied(what, url.name, "Check download.proxy, and the rules of the proxy")
    if not 200 <= answer.status < 300:
        what = f"The proxy {proxy.host} did not connect (status {answer.status})"
        raise SourceUnavailable(what, url.name, "Check the log of the proxy")


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
