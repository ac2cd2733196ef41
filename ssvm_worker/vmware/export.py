"""The data stream of one disk: an HTTPS GET from the host that the lease names."""

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

from .address import Address
from .trust import PinMismatch, context_for, parse_thumbprint, reason, refuse_other

#: Seconds to connect to a host.
_CONNECT_S = 10.0
#: Bytes of a stream that are read ahead.
_AHEAD = 512 * KiB


@dataclass(frozen=True)
class ExportLink:
    """Where the bytes are."""

    #: As the lease gives it; its host may be ``*``.
    url: str
    #: SHA-1 or SHA-256 of the host's certificate, as vSphere gives it over the trusted connection; may be empty.
    thumbprint: str
    #: Of the vCenter, which stands in where the lease says nothing.
    address: Address
    #: The session's; sent only to a host that refuses us without it.
    cookie: str = field(repr=False)

    @property
    def parts(self) -> SplitResult:
        """The URL with the host, and the port, that we are connected to in place of ``*``."""
        parts = urlsplit(self.url)
        if parts.hostname != "*":
            return parts
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return parts._replace(netloc=f"{host}:{parts.port or self.address.port}")

    @property
    def pin(self) -> str | None:
        """The certificate to insist on: the lease's, else the vCenter's own where it is the vCenter itself."""
        if self.thumbprint:
            return parse_thumbprint(self.thumbprint, self.parts.netloc)
        return self.address.pin if self.parts.hostname == self.address.host else None


class _Stream(HttpAnswer):
    """A body in chunks of HTTP that are small, as a host sends it: read ahead, they cost no look at the socket each.

    Of chunks of 32 KiB, http.client's own buffer of 8 KiB asks the socket twice for each.
    """

    def __init__(self, sock: socket.socket, *args: Any, **given: Any) -> None:
        super().__init__(sock, *args, **given)
        self.fp.close()
        self.fp = sock.makefile("rb", _AHEAD)  # type: ignore[assignment]  # the stub means the like of it


class DiskSource:
    """A ``Source`` of one file of a lease. The bytes are made as they are read: no size, no ranges, no resume.

    A 200 proves nothing: the stream's own structure has to be verified. Holds one chunk.
    """

    size: int | None = None
    resumable = False

    def __init__(self, link: ExportLink, check: Check) -> None:
        self._link = link
        self._check = check
        parts = link.parts
        #: Without the ticket in the path.
        self.name = f"{parts.netloc}/…/{parts.path.rpartition('/')[2]}"

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks; *offset* is 0.

        Raises SourceUnavailable (busy, cut, stalled), LeaseLost (the URL is dead), SourceDenied, Cancelled.
        """
        if offset:
            raise SourceUnavailable("A lease's stream cannot be resumed", self.name, "Take a new lease")
        with _translated(self.name, self._check), closing(self._connect()) as connection:
            answer = self._get(connection)
            yield from _chunks(answer)
            if answer.length:
                raise SourceUnavailable(f"The stream was cut, {answer.length} bytes early", self.name)

    def _get(self, connection: HTTPConnection) -> HTTPResponse:
        answer = self._ask(connection, "")
        if answer.status in (401, 403):
            connection.close()
            connection.sock = _dial(self._link, self._check)
            answer = self._ask(connection, self._link.cookie)
        if answer.status != 200:
            raise self._refusal(answer.status)
        return answer

    def _ask(self, connection: HTTPConnection, cookie: str) -> HTTPResponse:
        # The end of the connection is the end of the stream at once; who keeps it open is waited for.
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
            return LeaseLost("The lease's URL is dead (status 404)", self.name, "Take a new lease")
        if status in (401, 403):
            return SourceDenied(f"The host refuses us (status {status})", self.name, "Look at the user's privileges")
        return SourceUnavailable(f"The host answers with status {status}", self.name, "It may be busy; try again")


def secure(link: ExportLink, check: Check) -> WatchedTLSSocket:
    """A connection to the host, whose certificate is the right one; SourceUnavailable, SourceDenied, Cancelled."""
    with _translated(link.parts.netloc, check, "The host cannot be reached"):
        return _dial(link, check)


def _dial(link: ExportLink, check: Check) -> WatchedTLSSocket:
    """A connection whose certificate is known before anything is sent."""
    parts, pin = link.parts, link.pin
    tls = context_for(link.address.ca_file, pin)
    watch = StallWatch(check, link.address.timeout_s)
    sock = connect(parts.hostname or "", parts.port or 443, ConnectOptions(timeout_s=_CONNECT_S, tls=tls), watch)
    assert isinstance(sock, WatchedTLSSocket)
    try:
        if pin:
            refuse_other(sock.peer(), pin)
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def _translated(name: str, check: Check, broke: str = "The stream broke") -> Iterator[None]:
    try:
        yield
    except (ssl.SSLCertVerificationError, PinMismatch) as error:
        raise SourceDenied(
            f"The host's certificate is not trusted: {reason(error)}",
            name,
            "vCenter names no certificate for it, or another one: look at the host, or name its authority in ca_file",
        ) from error
    except (OSError, HTTPException) as error:
        check()  # a lease that is lost says more than the connection that was cut with it
        raise SourceUnavailable(
            f"{broke}: {error or type(error).__name__}", name, "Look at the host and the way to it"
        ) from error


def _chunks(answer: HTTPResponse) -> Iterator[bytes]:
    """The body; http.client raises IncompleteRead where the last chunk of a chunked one is missing."""
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    while size := answer.readinto(view):
        yield bytes(view[:size])
