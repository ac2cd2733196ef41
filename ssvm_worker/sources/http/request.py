"""One GET: connect where it is allowed, follow the redirects, translate what goes wrong. The adapter of urllib3."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException

from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from ssvm_worker import __version__
from ssvm_worker.errors import SourceDenied, SourceNotFound, SourceUnavailable, WorkerError
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.http_response import HttpAnswer, wait_wanted
from ssvm_worker.net.sockets import (
    TICK,
    AddressRefused,
    ConnectOptions,
    StallWatch,
    WatchedSocket,
    WatchedTLSSocket,
    connect,
    secure,
    tls_context,
)
from ssvm_worker.net.urls import WebUrl
from ssvm_worker.streaming.interfaces import Check

from .parallel import ConnectionPolicy
from .proxy import Proxy, refuse_address, tunnel

_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class HttpSettings:
    """How to fetch; proxy variables of the environment are never looked at."""

    rule: AddressRule = field(default_factory=AddressRule)
    #: Seconds to connect, name resolution not counted.
    connect_timeout_s: float = 10.0
    #: Seconds without a byte, or below min_rate bytes a second, that are a stall.
    stall_s: float = 60.0
    min_rate: float = 1024.0
    max_redirects: int = 5
    #: PEM file of authorities to trust besides the system's.
    ca_file: str | None = None
    #: The same for the origin of the caller's URL alone, and our own certificate for it (with its key).
    origin_ca_file: str | None = None
    certificate: str | None = None
    proxy: Proxy | None = None
    #: When to fetch over several connections, and how many.
    many: ConnectionPolicy = field(default_factory=ConnectionPolicy)

    def elsewhere(self) -> HttpSettings:
        """For any other origin."""
        return replace(self, origin_ca_file=None, certificate=None)

    def proxy_for(self, host: str) -> Proxy | None:
        """The proxy that leads to that host, if any."""
        return self.proxy if self.proxy and self.proxy.serves(host) else None


class HttpResponse:
    """An answer, its head read and its body still on the wire; ``close`` it."""

    def __init__(self, line: HttpConnection, response: BaseHTTPResponse) -> None:
        self.url = line.url
        self.line = line
        self.status = response.status
        self.headers = response.headers
        #: Bytes of the body; None where the server does not say.
        self.length = response.length_remaining
        #: The caller's headers that went along.
        self.trusted: Mapping[str, str] = {}
        self._response = response
        # read1 returns what has come, so that a reset does not cost the bytes before it; but it would return each
        # chunk of a chunked body by itself, and those may be tiny.
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        self._read = response.read if chunked else response.read1
        #: The connection of a body that ends with it, having neither a length nor a last chunk.
        self._ends_with = None if chunked or response.length_remaining is not None else line.socket

    def close(self) -> None:
        """Close the connection; an unread rest of the body is thrown away."""
        self._response.close()
        self.line.close()

    def read(self, size: int) -> bytes:
        """The next bytes of the body, *size* at the most, b"" at its end; a Content-Encoding is not undone.

        Raises what urllib3 raises when it is shorter than its Content-Length, or its last chunk is missing; what the
        socket raises when that is the end, and over TLS was not signed.
        """
        data = self._read(size, decode_content=False)
        if not data and self._ends_with and not self._ends_with.ended:
            raise ConnectionError("The bytes ended, but not the connection")
        return data

    @property
    def starved(self) -> float:
        """Seconds that reads have waited for bytes since the connection was made."""
        return self.line.socket.watch.starved if self.line.socket else 0.0


class HttpConnection:
    """A connection to one origin: made by our rules when it is needed, and again when the server has closed it."""

    def __init__(
        self, url: WebUrl, settings: HttpSettings, check: Check, *, keep: bool = False, node: str = ""
    ) -> None:
        """*keep*: ask the server to leave it open, for the next request when an answer has been read to its end.

        *node*: the address to connect to first, where the name has several.
        """
        self.url = url
        #: The address that it was connected to; empty before, and behind a proxy.
        self.node = node
        self.settings = settings
        #: What ends its waits; whoever takes the connection over sets its own.
        self.check = check
        self._keep = keep
        self._connection: HTTPConnection | None = None
        #: That of the last request: http.client forgets it where it will be closed with the body.
        self.socket: WatchedSocket | None = None

    def get(self, headers: Mapping[str, str]) -> HttpResponse:
        """Send a GET and read the head of its answer, a redirect or not; SourceDenied, SourceUnavailable."""
        used = self._is_open
        with translated(self.url.name):
            try:
                return self._get(headers)
            except (HTTPException, ConnectionError):
                self.close()
                if not used:
                    raise
            # A server may close what has been idle for a while, at the very moment of the next request.
            return self._get(headers)

    def close(self) -> None:
        """Close the connection, if there is one; safe to repeat."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _is_open(self) -> bool:
        return self._connection is not None and self._connection.sock is not None

    def _get(self, headers: Mapping[str, str]) -> HttpResponse:
        try:
            if self._connection is None or not self._is_open:
                self._connection = self._connect()
            self._connection.request(
                "GET", self._target, headers=self._head(headers), preload_content=False, decode_content=False
            )
            return HttpResponse(self, self._connection.getresponse())
        except BaseException:
            self.close()
            raise

    @property
    def _proxy(self) -> Proxy | None:
        return self.settings.proxy_for(self.url.host)

    def _connect(self) -> HTTPConnection:
        connection = HTTPConnection(self.url.host, self.url.port, timeout=TICK)
        # urllib3 finds itself connected: it opens no socket that we have not judged, and does no TLS of its own.
        connection.auto_open = 0
        connection.response_class = HttpAnswer
        connection.sock = self.socket = self._dial()
        return connection

    def _dial(self) -> WatchedSocket | WatchedTLSSocket:
        settings, url, proxy = self.settings, self.url, self._proxy
        files = (settings.ca_file, settings.origin_ca_file)
        tls = tls_context(*files, certificate=settings.certificate) if url.scheme == "https" else None
        watch = StallWatch(lambda: self.check(), settings.stall_s, settings.min_rate)
        if proxy is None:
            dial = ConnectOptions(settings.rule, settings.connect_timeout_s, tls, self.node)
            sock = connect(url.host, url.port, dial, watch)
            self.node = sock.getpeername()[0]
            return sock
        refuse_address(url, settings.rule)
        plain = connect(proxy.host, proxy.port, ConnectOptions(settings.rule, settings.connect_timeout_s), watch)
        assert isinstance(plain, WatchedSocket)
        if tls is None:
            return plain
        try:
            tunnel(plain, url, proxy)
        except BaseException:
            plain.close()
            raise
        return secure(plain, url.host, tls)

    @property
    def _target(self) -> str:
        """As it stands in the request line: a proxy that is no tunnel wants all of the URL."""
        whole = self._proxy and self.url.scheme == "http"
        return f"http://{self.url.authority}{self.url.target}" if whole else self.url.target

    def _head(self, headers: Mapping[str, str]) -> dict[str, str]:
        ours = {"Host": self.url.authority, "Accept-Encoding": "identity"}
        ours |= {} if self._keep else {"Connection": "close"}
        ours |= self._proxy.headers if self._proxy and self.url.scheme == "http" else {}
        agent = {} if "user-agent" in map(str.lower, headers) else {"User-Agent": f"ssvm-worker/{__version__}"}
        return {**agent, **headers, **ours}


def get(
    url: WebUrl,
    own: Mapping[str, str],
    headers: Mapping[str, str],
    settings: HttpSettings,
    check: Check,
    *,
    node: str = "",
) -> HttpResponse:
    """Send a GET and follow redirects; the answer has any other status.

    *own* headers go to every hop; the caller's *headers*, which may hold credentials, only to the origin that he gave.
    *node* is the address to connect to first.
    Raises SourceDenied for a hop that is not allowed, a loop, or too many; SourceUnavailable.
    """
    seen = [url]
    while True:
        at_home = all(each.origin == url.origin for each in seen)
        trusted = headers if at_home else {}
        line = HttpConnection(seen[-1], settings if at_home else settings.elsewhere(), check, node=node)
        answer = line.get({**trusted, **own})
        answer.trusted = trusted
        location = answer.headers.get("Location")
        if answer.status not in _REDIRECTS or not location:
            return answer
        answer.close()
        seen.append(_next_hop(seen, location, settings.max_redirects))


def _next_hop(seen: list[WebUrl], location: str, most: int) -> WebUrl:
    here = seen[-1]
    try:
        there = here.join(location)
    except WorkerError as error:
        what = f"The server redirects to where we do not go: {error.what}"
        raise SourceDenied(what, here.name, error.remedy) from error
    if here.scheme == "https" and there.scheme == "http":
        raise SourceDenied(
            f"The server redirects from https to {there.name}", here.name, "Give an URL that stays with https"
        )
    if there in seen:
        chain = " -> ".join(each.name for each in (*seen, there))
        raise SourceDenied(f"The redirects run in a loop: {chain}", seen[0].name, "Tell the server's owner")
    if len(seen) > most:
        raise SourceDenied(f"More than {most} redirects", seen[0].name, f"Give the last URL itself: {there.name}")
    return there


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what sockets, ssl, http.client and urllib3 raise into a WorkerError.

    They raise ValueError and UnicodeError for some numbers and names of a hostile server.
    """
    try:
        yield
    except (HTTPError, HTTPException, OSError, ValueError) as error:
        # urllib3 wraps what it caught, and its text is the representation of that.
        cause = error.__cause__ if isinstance(error.__cause__, OSError | HTTPException) else error
        raise translate(cause, where) from error


def translate(error: BaseException, where: str) -> WorkerError:
    """Our error for what a connection raised."""
    if isinstance(error, AddressRefused):
        return SourceDenied(
            str(error), where, "Only public addresses are fetched from; list others in download.allow_networks"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return SourceDenied(
            f"The server's certificate is not trusted: {error.verify_message}",
            where,
            "If it is from an authority of your own, name its certificate in ca_file",
        )
    what = "The connection failed" if isinstance(error, OSError) else "The answer is no good HTTP"
    return SourceUnavailable(f"{what}: {error}", where, "Look at the server and the way to it")


def refusal(answer: HttpResponse, where: str = "") -> WorkerError:
    """Return the error that an answer without the bytes stands for."""
    status, where = answer.status, where or answer.url.name
    if status in (404, 410):
        return SourceNotFound(f"There is nothing (status {status})", where, "Look at the URL")
    if status in (401, 403, 407):
        return SourceDenied(
            f"The server refuses us (status {status})",
            where,
            "Give headers or credentials, or a link that is still valid",
        )
    if status in (408, 425, 429) or status >= 500 or status < 300:
        busy = SourceUnavailable(f"The server gives no bytes now (status {status})", where, "Look at the server")
        busy.after_s = wait_wanted(answer.headers)
        return busy
    return SourceDenied(f"The server does not take the request (status {status})", where, "Look at the URL and headers")
