"""The data stream of one file of a lease: an HTTPS GET from the host that the lease names."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ssvm_worker.errors import LeaseLost, SourceDenied, SourceUnavailable, WorkerError
from ssvm_worker.net.http_response import HttpAnswer
from ssvm_worker.net.sockets import TICK, ConnectOptions, StallWatch, WatchedTLSSocket, connect
from ssvm_worker.streaming.interfaces import CHUNK, Check
from ssvm_worker.units import KiB

from .trust import Address, PinMismatch, context_for, failure_reason, parse_thumbprint, require_pin

#: Seconds to connect to a host.
_CONNECT_S = 10.0
#: Bytes to read ahead from a stream.
_AHEAD = 512 * KiB


@dataclass(frozen=True)
class ExportLink:
    """The URL of a file of a lease, with the data that a connection to its host needs."""

    #: The URL from the lease. Its host may be ``*``.
    url: str
    #: SHA-1 or SHA-256 thumbprint of the host's certificate, received over the trusted connection. May be empty.
    thumbprint: str
    #: The vCenter's address. It replaces data that the lease does not give.
    address: Address
    #: The session's cookie. The worker sends it only to a host that rejects a request without it.
    cookie: str = field(repr=False)

    @property
    def parts(self) -> SplitResult:
        """Return the URL; the vCenter's host and port replace ``*``."""
        parts = urlsplit(self.url)
        if parts.hostname != "*":
            return parts
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return parts._replace(netloc=f"{host}:{parts.port or self.address.port}")

    @property
    def pin(self) -> str | None:
        """Return the thumbprint from the lease, or the vCenter's own if the host is the vCenter itself."""
        if self.thumbprint:
            return parse_thumbprint(self.thumbprint, self.parts.netloc)
        return self.address.pin if self.parts.hostname == self.address.host else None


class _Stream(HttpAnswer):
    """An answer with a large read-ahead buffer, because hosts send a body in small HTTP chunks.

    With http.client's own buffer of 8 KiB, each chunk of 32 KiB takes two reads from the socket.
    """

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = sock.makefile("rb", _AHEAD)  # type: ignore[assignment]  # the stub's type is too narrow


class DiskSource:
    """A ``Source`` of one file of a lease. It has no size and supports neither ranges nor resume.

    The host generates the bytes during the transfer. Status 200 does not prove that the stream is complete.
    The caller must verify the structure of the stream. Memory use: one chunk.
    """

    size: int | None = None
    resumable = False

    def __init__(self, link: ExportLink, check: Check) -> None:
        self._link = link
        self._check = check
        parts = link.parts
        #: The URL without the secret ticket in its path.
        self.name = f"{parts.netloc}/…/{parts.path.rpartition('/')[2]}"

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks. *offset* must be 0.

        Raises SourceUnavailable (busy, disconnected, stalled), LeaseLost (expired URL), SourceDenied and Cancelled.
        """
        if offset:
            raise SourceUnavailable("The stream of a lease cannot be resumed", self.name, "Request a new lease")
        with _translated(self.name, self._check), closing(self._connect()) as connection:
            answer = self._get(connection)
            # http.client raises IncompleteRead if the last chunk of a chunked body is missing.
            view = memoryview(bytearray(CHUNK))
            while size := answer.readinto(view):
                yield bytes(view[:size])
            if answer.length:
                raise SourceUnavailable(f"The stream ended {answer.length} bytes early", self.name)

    def _get(self, connection: HTTPConnection) -> HTTPResponse:
        """Send the request without the cookie. If the host rejects it, send it again with the cookie."""
        answer = self._request(connection, "")
        if answer.status in (401, 403):
            connection.close()
            connection.sock = _dial(self._link, self._check)
            answer = self._request(connection, self._link.cookie)
        if answer.status != 200:
            raise self._refusal(answer.status)
        return answer

    def _request(self, connection: HTTPConnection, cookie: str) -> HTTPResponse:
        # The host closes the connection at the end of the stream, so the end is noticed without a delay.
        headers = {"Host": self._link.parts.netloc, "Accept-Encoding": "identity", "Connection": "close"}
        connection.request("GET", self._link.parts.path, headers=headers | ({"Cookie": cookie} if cookie else {}))
        return connection.getresponse()

    def _connect(self) -> HTTPConnection:
        connection = HTTPConnection(self._link.parts.netloc, timeout=TICK)
        connection.response_class = _Stream
        connection.sock = _dial(self._link, self._check)
        return connection

    def _refusal(self, status: int) -> WorkerError:
        if status == 404:
            return LeaseLost("The lease's URL has expired (status 404)", self.name, "Request a new lease")
        if status in (401, 403):
            return SourceDenied(f"The host denies access (status {status})", self.name, "Check the user's privileges")
        return SourceUnavailable(
            f"The host answered with status {status}", self.name, "The host may be busy; try again"
        )


def connect_to_host(link: ExportLink, check: Check) -> WatchedTLSSocket:
    """Connect to the host and check its certificate. Raises SourceUnavailable, SourceDenied and Cancelled."""
    with _translated(link.parts.netloc, check, "The host cannot be reached"):
        return _dial(link, check)


def _dial(link: ExportLink, check: Check) -> WatchedTLSSocket:
    """Connect and check the certificate before any data is sent."""
    parts, pin = link.parts, link.pin
    tls = context_for(link.address.ca_file, pin)
    watch = StallWatch(check, link.address.timeout_s)
    sock = connect(parts.hostname or "", parts.port or 443, ConnectOptions(timeout_s=_CONNECT_S, tls=tls), watch)
    assert isinstance(sock, WatchedTLSSocket)
    try:
        if pin:
            require_pin(sock.peer(), pin)
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def _translated(name: str, check: Check, what: str = "The stream broke") -> Iterator[None]:
    try:
        yield
    except (ssl.SSLCertVerificationError, PinMismatch) as error:
        raise SourceDenied(
            f"The host's certificate is not trusted: {failure_reason(error)}",
            name,
            "vCenter gives no or another thumbprint for this host: check the host, or set ca_file to its authority",
        ) from error
    except (OSError, HTTPException) as error:
        check()  # prefer the error of a lost lease, which explains the broken connection
        raise SourceUnavailable(
            f"{what}: {error or type(error).__name__}", name, "Check the host and the network path to it"
        ) from error
