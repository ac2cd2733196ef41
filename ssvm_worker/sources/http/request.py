"""Send one GET: connect to an allowed address, follow redirects, translate errors. The adapter of urllib3."""

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
    """Settings of HTTP downloads. The proxy variables of the environment are ignored."""

    rule: AddressRule = field(default_factory=AddressRule)
    #: Seconds to connect, without the time of name resolution.
    connect_timeout_s: float = 10.0
    #: Seconds without a byte, or with fewer than *min_rate* bytes per second, after which the transfer has stalled.
    stall_s: float = 60.0
    min_rate: float = 1024.0
    max_redirects: int = 5
    #: PEM file of certificate authorities to trust in addition to those of the system.
    ca_file: str | None = None
    #: The same for the origin of the caller's URL only, and the client certificate for this origin (with its key).
    origin_ca_file: str | None = None
    certificate: str | None = None
    proxy: Proxy | None = None
    #: When to use several connections, and how many.
    parallel: ConnectionPolicy = field(default_factory=ConnectionPolicy)

    def without_client_certificate(self) -> HttpSettings:
        """Return the settings for any origin other than the caller's."""
        return replace(self, origin_ca_file=None, certificate=None)


class HttpResponse:
    """Answer whose head was read. Its body is still on the connection. The owner must call ``close``."""

    def __init__(self, connection: HttpConnection, response: BaseHTTPResponse) -> None:
        self.url = connection.url
        self.connection = connection
        self.status = response.status
        self.headers = response.headers
        #: Bytes of the body, or None if the server does not announce them.
        self.length = response.length_remaining
        #: The caller's headers that were sent with the request.
        self.trusted: Mapping[str, str] = {}
        self._response = response
        # read1 returns the bytes that have arrived, so a reset does not lose them. But for a chunked body it returns
        # each chunk separately, and these may be tiny.
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        self._read = response.read if chunked else response.read1
        #: The socket, if only its end marks the end of the body: there is no length and no last chunk.
        self._ends_with = None if chunked or response.length_remaining is not None else connection.socket

    def close(self) -> None:
        """Close the connection, and drop the unread rest of the body."""
        self._response.close()
        self.connection.close()

    def read(self, size: int) -> bytes:
        """Return at most *size* bytes of the body, or b"" at its end. A Content-Encoding is not decoded.

        Raises the error of urllib3 if the body is shorter than its Content-Length, or has no last chunk.
        Raises the error of the socket if the body ends with the connection, and TLS has not signed this end.
        """
        data = self._read(size, decode_content=False)
        if not data and self._ends_with and not self._ends_with.ended:
            raise ConnectionError("The bytes ended, but not the connection")
        return data

    @property
    def starved(self) -> float:
        """Return the seconds that reads have waited for bytes since the connection was made."""
        return self.connection.socket.watch.starved if self.connection.socket else 0.0


class HttpConnection:
    """Connection to one origin. It connects at the first request, and again after the server has closed it."""

    def __init__(
        self, url: WebUrl, settings: HttpSettings, check: Check, *, keep: bool = False, node: str = ""
    ) -> None:
        """Store the options without connecting.

        *keep*: ask the server to keep the connection open for another request after each complete answer.
        *node*: the address to connect to first if the name has several.
        """
        self.url = url
        #: The address of the connection. It is empty before the connection, and behind a proxy.
        self.node = node
        self.settings = settings
        #: Called in every wait. A new owner of the connection sets its own check.
        self.check = check
        self._keep = keep
        self._connection: HTTPConnection | None = None
        #: The socket of the last request. http.client drops it if the connection closes with the body.
        self.socket: WatchedSocket | None = None

    def get(self, headers: Mapping[str, str]) -> HttpResponse:
        """Send a GET and read the head of its answer, without following a redirect.

        Raises SourceDenied or SourceUnavailable.
        """
        used = self._is_open
        with translating(self.url.name):
            try:
                return self._get(headers)
            except (HTTPException, ConnectionError):
                self.close()
                if not used:
                    raise
            # A server may close an idle connection at the moment of the next request. So try once more.
            return self._get(headers)

    def close(self) -> None:
        """Close the connection if there is one. Further calls have no effect."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _is_open(self) -> bool:
        return self._connection is not None and self._connection.sock is not None

    def _get(self, headers: Mapping[str, str]) -> HttpResponse:
        try:
            if self._connection is None or not self._is_open:
                connection = HTTPConnection(self.url.host, self.url.port, timeout=TICK)
                # With the socket given here, urllib3 never opens an unchecked socket, nor does it use its own TLS.
                connection.auto_open = 0
                connection.response_class = HttpAnswer
                connection.sock = self.socket = self._open_socket()
                self._connection = connection
            is_absolute = self._proxy and self.url.scheme == "http"  # for a proxy without a tunnel
            target = f"http://{self.url.authority}{self.url.target}" if is_absolute else self.url.target
            self._connection.request(
                "GET", target, headers=self._all_headers(headers), preload_content=False, decode_content=False
            )
            return HttpResponse(self, self._connection.getresponse())
        except BaseException:
            self.close()
            raise

    @property
    def _proxy(self) -> Proxy | None:
        proxy = self.settings.proxy
        return proxy if proxy and proxy.serves(self.url.host) else None

    def _open_socket(self) -> WatchedSocket | WatchedTLSSocket:
        settings, url, proxy = self.settings, self.url, self._proxy
        files = (settings.ca_file, settings.origin_ca_file)
        tls = tls_context(*files, certificate=settings.certificate) if url.scheme == "https" else None
        watch = StallWatch(lambda: self.check(), settings.stall_s, settings.min_rate)
        if proxy is None:
            options = ConnectOptions(settings.rule, settings.connect_timeout_s, tls, self.node)
            sock = connect(url.host, url.port, options, watch)
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

    def _all_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        fixed = {"Host": self.url.authority, "Accept-Encoding": "identity"}
        fixed |= {} if self._keep else {"Connection": "close"}
        fixed |= self._proxy.headers if self._proxy and self.url.scheme == "http" else {}
        agent = {} if "user-agent" in map(str.lower, headers) else {"User-Agent": f"ssvm-worker/{__version__}"}
        return {**agent, **headers, **fixed}


def get(
    url: WebUrl,
    range_headers: Mapping[str, str],
    headers: Mapping[str, str],
    settings: HttpSettings,
    check: Check,
    *,
    node: str = "",
) -> HttpResponse:
    """Send a GET and follow redirects. Return the first answer that is not a redirect.

    *range_headers* are sent to every hop. *headers* may hold credentials, so only the origin of *url* gets them.
    *node* is the address to connect to first.
    Raises SourceDenied for a forbidden hop, a loop, or too many redirects. Raises SourceUnavailable.
    """
    hops = [url]
    while True:
        is_same_origin = all(each.origin == url.origin for each in hops)
        trusted = headers if is_same_origin else {}
        hop_settings = settings if is_same_origin else settings.without_client_certificate()
        answer = HttpConnection(hops[-1], hop_settings, check, node=node).get({**trusted, **range_headers})
        answer.trusted = trusted
        location = answer.headers.get("Location")
        if answer.status not in _REDIRECTS or not location:
            return answer
        answer.close()
        hops.append(_next_hop(hops, location, settings.max_redirects))


def _next_hop(hops: list[WebUrl], location: str, max_redirects: int) -> WebUrl:
    current = hops[-1]
    try:
        target = current.join(location)
    except WorkerError as error:
        what = f"The server redirects to a URL that is not allowed: {error.what}"
        raise SourceDenied(what, current.name, error.remedy) from error
    if current.scheme == "https" and target.scheme == "http":
        what = f"The server redirects from https to http: {target.name}"
        raise SourceDenied(what, current.name, "Give a URL whose redirects stay on https")
    if target in hops:
        chain = " -> ".join(each.name for each in (*hops, target))
        raise SourceDenied(f"The redirects form a loop: {chain}", hops[0].name, "Report this to the server's owner")
    if len(hops) > max_redirects:
        what = f"More than {max_redirects} redirects"
        raise SourceDenied(what, hops[0].name, f"Give the last URL itself: {target.name}")
    return target


@contextmanager
def translating(where: str) -> Iterator[None]:
    """Turn errors of sockets, ssl, http.client and urllib3 into a WorkerError while the block runs.

    These libraries raise ValueError and UnicodeError for some numbers and names of a hostile server.
    """
    try:
        yield
    except (HTTPError, HTTPException, OSError, ValueError) as error:
        # urllib3 wraps the error that it caught. The text of the wrapper is the representation of that error.
        cause = error.__cause__ if isinstance(error.__cause__, OSError | HTTPException) else error
        raise translate_error(cause, where) from error


def translate_error(error: BaseException, where: str) -> WorkerError:
    """Return the WorkerError for an error of a connection."""
    if isinstance(error, AddressRefused):
        remedy = "Only public addresses are allowed. Add other networks to download.allow_networks"
        return SourceDenied(str(error), where, remedy)
    if isinstance(error, ssl.SSLCertVerificationError):
        return SourceDenied(
            f"The server's certificate is not trusted: {error.verify_message}",
            where,
            "For a private certificate authority, set ca_file to its certificate",
        )
    what = "The connection failed" if isinstance(error, OSError) else "The answer is not valid HTTP"
    return SourceUnavailable(f"{what}: {error}", where, "Check the server, and the network between")


def refusal(answer: HttpResponse, where: str = "") -> WorkerError:
    """Return the error for an answer without the requested bytes."""
    status, where = answer.status, where or answer.url.name
    if status in (404, 410):
        return SourceNotFound(f"The server has no such object (status {status})", where, "Check the URL")
    if status in (401, 403, 407):
        return SourceDenied(
            f"The server refused the request (status {status})",
            where,
            "Give headers or credentials, or a link that is still valid",
        )
    if status in (408, 425, 429) or status >= 500 or status < 300:
        busy = SourceUnavailable(f"The server cannot send the file now (status {status})", where, "Check the server")
        busy.after_s = wait_wanted(answer.headers)
        return busy
    what = f"The server does not accept the request (status {status})"
    return SourceDenied(what, where, "Check the URL and the headers")
