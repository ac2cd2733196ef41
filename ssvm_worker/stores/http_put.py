"""A destination that takes one HTTP PUT: a presigned S3 URL, or any server that keeps what is put."""

from __future__ import annotations

import re
import select
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse

from ssvm_worker import __version__
from ssvm_worker.errors import ObjectNotFound, StoreDenied, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.http_response import MOST_INTERIM, HttpAnswer, wait_wanted
from ssvm_worker.net.sockets import (
    TICK,
    AddressRefused,
    ConnectOptions,
    StallWatch,
    WatchedTLSSocket,
    connect,
    tls_context,
)
from ssvm_worker.net.urls import check_headers, parse
from ssvm_worker.streaming.interfaces import CannotResume, Check, StoredObject
from ssvm_worker.units import KiB

#: The error code of an S3 server's XML answer.
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
#: The head of an interim answer; 101 is none that we can go on after (RFC 9110, 15.2).
_INTERIM = re.compile(rb"HTTP/1\.\d +1(?!01)\d\d[ \r\n].*?\n\r?\n", re.DOTALL)
_INTERIM_BEGINS = re.compile(rb"HTTP/1\.\d +1(?!01)\d\d")
#: Bytes of a status line up to its code.
_SHORTEST = len("HTTP/1.1 100")


@dataclass(frozen=True)
class PutSettings:
    """How to put; the fields are those of a download."""

    rule: AddressRule = field(default_factory=AddressRule)
    connect_timeout_s: float = 10.0
    #: Seconds without a byte taken, or below min_rate bytes a second, that are a stall; also until the answer.
    stall_s: float = 60.0
    min_rate: float = 1024.0
    ca_file: str | None = None


class PutSink(CannotResume):
    """A ``Sink`` over one PUT with a Content-Length.

    Nothing is stored unless the server has all *size* bytes, so the last chunk is held back until ``commit``: what is
    verified after its last byte can still be aborted then. Redirects are not followed: the
    bytes have gone. Closing early leaves the server with a body shorter than promised, which it throws away.
    """

    def __init__(
        self,
        url: str,
        size: int,
        settings: PutSettings,
        *,
        headers: Mapping[str, str] | None = None,
        check: Check = lambda: None,
    ) -> None:
        """Raises InvalidRequest for a URL or header that is never sent; connects at the first write."""
        self._url = parse(url)
        self._headers = check_headers(headers or {})
        self._size = size
        self._settings = settings
        self._watch = StallWatch(check, settings.stall_s, settings.min_rate)
        self._taken = self._sent = 0
        self._held = b""
        self._interim = 0
        self._connection: HTTPConnection | None = None
        self.key = self._url.name

    def write(self, chunk: bytes) -> None:
        """Send the chunk before this one; raises what the server says as soon as it answers, be it before the end.

        Raises StoreDenied, ObjectNotFound, StoreFull, StoreUnavailable.
        """
        self._taken += len(chunk)
        if self._taken > self._size:
            raise ValueError(f"more than the {self._size} bytes that were promised to {self.key}")
        self._send(self._held)
        self._held = chunk

    def _send(self, chunk: bytes) -> None:
        connection = self._connected()
        if not chunk:
            return
        self._sent += len(chunk)
        try:
            if self._has_answer(connection.sock):
                raise self._early_answer()
            connection.send(chunk)
        except OSError as error:
            # A server that refuses answers first and closes then; its answer says more than our broken pipe.
            raise self._early_answer(error) from error

    def commit(self) -> StoredObject:
        """Wait for the server's answer; the size is what was sent, PUT has no way of reading it back."""
        if self._taken != self._size:
            raise ValueError(f"{self._taken} of the {self._size} bytes promised to {self.key}")
        self._send(self._held)
        connection = self._connected()
        try:
            answer = connection.getresponse()
        except (OSError, HTTPException) as error:
            raise self._broken(error) from error
        if not 200 <= answer.status < 300:
            raise self._refusal(answer)
        self.abort()
        return StoredObject(self.key, self._size, modified=time.time())

    def abort(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def _connected(self) -> HTTPConnection:
        if self._connection is not None:
            return self._connection
        url, settings = self._url, self._settings
        tls = tls_context(settings.ca_file) if url.scheme == "https" else None
        connection = HTTPConnection(url.host, url.port, timeout=TICK)
        connection.response_class = HttpAnswer
        try:
            connection.sock = connect(
                url.host, url.port, ConnectOptions(settings.rule, settings.connect_timeout_s, tls), self._watch
            )
            self._connection = connection
            self._send_head(connection)
        except OSError as error:
            raise self._broken(error) from error
        return connection

    def _send_head(self, connection: HTTPConnection) -> None:
        connection.putrequest("PUT", self._url.target, skip_host=True, skip_accept_encoding=True)
        agent = {} if "user-agent" in map(str.lower, self._headers) else {"User-Agent": f"ssvm-worker/{__version__}"}
        ours = {"Host": self._url.authority, "Content-Length": str(self._size), "Connection": "close"}
        for name, value in {**agent, **self._headers, **ours}.items():
            connection.putheader(name, value)
        connection.endheaders()

    def _has_answer(self, sock: socket.socket) -> bool:
        """Take interim answers away, which may come before the body; return whether another one has come.

        Over TLS one cannot know: a session ticket makes the socket readable. What has come stays until ``commit``.
        """
        if isinstance(sock, WatchedTLSSocket):
            return False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        while poll.poll(0):
            seen = sock.recv(64 * KiB, socket.MSG_PEEK)
            interim = _INTERIM.match(seen)
            if interim is None:
                is_begun = _INTERIM_BEGINS.match(seen) or len(seen) < _SHORTEST
                return not (seen and is_begun and len(seen) < 64 * KiB)
            self._interim += 1
            if self._interim > MOST_INTERIM:
                return True
            sock.recv(interim.end())
        return False

    def _early_answer(self, broken: OSError | None = None) -> WorkerError:
        assert self._connection is not None
        try:
            answer = self._connection.getresponse()
        except (OSError, HTTPException) as error:
            return self._broken(broken or error)
        if answer.status < 300:
            return StoreUnavailable(
                f"The server answered {answer.status} after {self._sent} of {self._size} bytes", self.key, "Look at it"
            )
        return self._refusal(answer)

    def _refusal(self, answer: HTTPResponse) -> WorkerError:
        error = refusal(answer.status, self.key, _code(answer))
        if isinstance(error, StoreUnavailable):
            error.after_s = wait_wanted(answer.headers)
        return error

    def _broken(self, error: BaseException) -> WorkerError:
        if isinstance(error, AddressRefused):
            return StoreDenied(
                str(error), self.key, "Uploads go to public addresses only; list others in upload.allow_networks"
            )
        if isinstance(error, ssl.SSLCertVerificationError):
            return StoreDenied(
                f"The server's certificate is not trusted: {error.verify_message}",
                self.key,
                "If it is from an authority of your own, name its certificate in ca_file",
            )
        return StoreUnavailable(
            f"The connection failed after {self._sent} of {self._size} bytes: {error}", self.key, "Look at the server"
        )


def refusal(status: int, where: str, code: str = "") -> WorkerError:
    """The error that a status other than 2xx stands for; *code* is the server's own word."""
    said = f"status {status} {code}".rstrip()
    if status in (401, 403):
        return StoreDenied(
            f"The server refuses us ({said})", where, "A presigned URL may have expired; ask for a new one"
        )
    if status in (404, 410):
        return ObjectNotFound(f"There is no such place ({said})", where, "Look at the bucket and the path of the URL")
    if status == 507:
        return StoreFull(f"The server has no room ({said})", where, "Make room there")
    if 300 <= status < 400:
        return StoreDenied(f"The server redirects a PUT ({said})", where, "Give the URL that it redirects to")
    if status in (408, 425, 429) or (status >= 500 and status not in (501, 505)):
        return StoreUnavailable(f"The server takes no bytes now ({said})", where, "Look at the server")
    return StoreDenied(f"The server does not take the PUT ({said})", where, "Look at the URL, the headers and the size")


def _code(answer: HTTPResponse) -> str:
    try:
        match = _CODE.search(answer.read(4 * KiB))
    except (OSError, HTTPException):  # the status is known, and says enough
        return ""
    return match[1].decode() if match else ""
