"""Upload with one HTTP PUT: to a presigned S3 URL, or to any server that stores the body."""

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

#: The error code in the XML answer of an S3 server.
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
#: The head of an interim answer. After 101 HTTP ends, so 101 does not count (RFC 9110, 15.2).
_INTERIM = re.compile(rb"HTTP/1\.\d +1(?!01)\d\d[ \r\n].*?\n\r?\n", re.DOTALL)
_INTERIM_BEGINS = re.compile(rb"HTTP/1\.\d +1(?!01)\d\d")
#: Bytes of a status line up to the end of its code.
_STATUS_LENGTH = len("HTTP/1.1 100")


@dataclass(frozen=True)
class PutSettings:
    """Limits of a PUT. The fields are those of a download."""

    rule: AddressRule = field(default_factory=AddressRule)
    connect_timeout_s: float = 10.0
    #: A transfer stalls after this many seconds without progress, or below min_rate bytes a second. The wait for the
    #: answer has the same limit.
    stall_s: float = 60.0
    min_rate: float = 1024.0
    ca_file: str | None = None


class PutSink(CannotResume):
    """A sink that sends one PUT with a Content-Length.

    The server stores nothing unless it gets all *size* bytes. So the sink holds the last chunk until ``commit``: the
    caller can verify all bytes first, and abort. An abort leaves the server with an incomplete body, which the server
    discards. The sink does not follow redirects, because it has already sent the bytes.
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
        """Raise InvalidRequest for an invalid URL or header. The first write connects."""
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
        """Send the previous chunk and hold this one. Raise the error of an early answer as soon as it arrives.

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
            # A server that refuses a PUT answers and closes. Its answer is more precise than the broken pipe.
            raise self._early_answer(error) from error

    def commit(self) -> StoredObject:
        """Send the last chunk and wait for the answer. The size is the number of sent bytes: PUT cannot read it."""
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
            connection.putrequest("PUT", url.target, skip_host=True, skip_accept_encoding=True)
            has_agent = "user-agent" in map(str.lower, self._headers)
            agent = {} if has_agent else {"User-Agent": f"ssvm-worker/{__version__}"}
            own = {"Host": url.authority, "Content-Length": str(self._size), "Connection": "close"}
            for name, value in {**agent, **self._headers, **own}.items():
                connection.putheader(name, value)
            connection.endheaders()
        except OSError as error:
            raise self._broken(error) from error
        return connection

    def _has_answer(self, sock: socket.socket) -> bool:
        """Drop interim answers, which a server may send before the body. Return whether a final answer has arrived.

        TLS hides answers: a session ticket also makes the socket readable. So the answer waits until ``commit``.
        """
        if isinstance(sock, WatchedTLSSocket):
            return False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        while poll.poll(0):
            seen = sock.recv(64 * KiB, socket.MSG_PEEK)
            interim = _INTERIM.match(seen)
            if interim is None:
                is_begun = _INTERIM_BEGINS.match(seen) or len(seen) < _STATUS_LENGTH
                return not (seen and is_begun and len(seen) < 64 * KiB)
            self._interim += 1
            if self._interim > MOST_INTERIM:
                return True
            sock.recv(interim.end())
        return False

    def _early_answer(self, broken: OSError | None = None) -> WorkerError:
        """Return the error for an answer before the last byte."""
        assert self._connection is not None
        try:
            answer = self._connection.getresponse()
        except (OSError, HTTPException) as error:
            return self._broken(broken or error)
        if answer.status < 300:
            what = f"The server answered {answer.status} after {self._sent} of {self._size} bytes"
            return StoreUnavailable(what, self.key, "Check the server")
        return self._refusal(answer)

    def _refusal(self, answer: HTTPResponse) -> WorkerError:
        """Return the error for a status other than 2xx. The message has the server's own error code."""
        try:
            match = _CODE.search(answer.read(4 * KiB))
        except (OSError, HTTPException):  # the status is enough
            match = None
        error = _status_error(answer.status, self.key, match[1].decode() if match else "")
        if isinstance(error, StoreUnavailable):
            error.after_s = wait_wanted(answer.headers)
        return error

    def _broken(self, error: BaseException) -> WorkerError:
        """Return the error for a connection that cannot be opened or breaks."""
        if isinstance(error, AddressRefused):
            remedy = "Uploads need a public address. Add other networks to upload.allow_networks"
            return StoreDenied(str(error), self.key, remedy)
        if isinstance(error, ssl.SSLCertVerificationError):
            return StoreDenied(
                f"The server's certificate is not trusted: {error.verify_message}",
                self.key,
                "For a private authority, set its certificate in ca_file",
            )
        what = f"The connection failed after {self._sent} of {self._size} bytes: {error}"
        return StoreUnavailable(what, self.key, "Check the server")


def _status_error(status: int, location: str, code: str) -> WorkerError:
    reason = f"status {status} {code}".rstrip()
    if status in (401, 403):
        remedy = "A presigned URL may have expired. Request a new URL"
        return StoreDenied(f"The server denies access ({reason})", location, remedy)
    if status in (404, 410):
        return ObjectNotFound(f"The URL does not exist ({reason})", location, "Check the URL's bucket and path")
    if status == 507:
        return StoreFull(f"The server has no room ({reason})", location, "Free space on the server")
    if 300 <= status < 400:
        return StoreDenied(f"The server redirects a PUT ({reason})", location, "Give the URL of the redirect's target")
    if status in (408, 425, 429) or (status >= 500 and status not in (501, 505)):
        return StoreUnavailable(f"The server is unavailable ({reason})", location, "Check the server")
    return StoreDenied(f"The server rejects the PUT ({reason})", location, "Check the URL, the headers and the size")
