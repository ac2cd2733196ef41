"""The data stream of one file of a new VM: an HTTPS PUT or POST to the host that the lease names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Self

from ssvm_worker.errors import LeaseLost, SourceDenied, SourceUnavailable, WorkerError
from ssvm_worker.net.http_response import HttpAnswer
from ssvm_worker.net.sockets import TICK
from ssvm_worker.streaming.interfaces import Check, StoredObject

from .export import ExportLink, secure

#: What is sent to a file that the lease has made, and to one that the host is to make.
_STREAM, _PLAIN = "application/x-vnd.vmware-streamVmdk", "application/octet-stream"


class HostSink:
    """A ``Sink`` over one request. What it has taken stands when the lease is completed, and goes if it is not.

    *size*: bytes that will come. *create*: the host makes the file (PUT), else the lease has
    made it already (POST). Raises LeaseLost, SourceDenied, SourceUnavailable, and what *check* does. Holds no bytes.
    """

    offset = 0

    def __init__(self, link: ExportLink, size: int, check: Check, *, create: bool) -> None:
        parts = link.parts
        #: Without the ticket in the path.
        self.key = f"{parts.netloc}/…/{parts.path.rpartition('/')[2]}"
        self._link = link
        self._size = size
        self._check = check
        self._method = "PUT" if create else "POST"
        self._connection: HTTPConnection | None = None
        self._sent = 0

    def write(self, chunk: bytes) -> None:
        """Send a chunk; connects at the first."""
        connection = self._connected()
        with self._translated():
            connection.send(chunk)
        self._sent += len(chunk)

    def resumed(self) -> Iterator[bytes]:
        """Nothing: a lease's upload cannot be resumed."""
        return iter(())

    def sync(self) -> int:
        """Nothing, as with ``resumed``."""
        return 0

    def commit(self) -> StoredObject:
        """Wait until the host says that it has all of it."""
        connection = self._connected()
        with self._translated():
            answer = connection.getresponse()
        if not 200 <= answer.status < 300:
            raise self._refusal(answer)
        self.abort()
        return StoredObject(self.key, self._sent, modified=time.time())

    def abort(self) -> None:
        """Close the connection; what was sent goes with the lease."""
        if self._connection is not None:
            self._connection.close()

    def suspend(self) -> None:
        """Abort."""
        self.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    def _connected(self) -> HTTPConnection:
        if self._connection is None:
            connection = HTTPConnection(self._link.parts.netloc, timeout=TICK)
            connection.response_class = HttpAnswer
            connection.sock = secure(self._link, self._check)
            self._connection = connection
            with self._translated():
                self._send_head(connection)
        return self._connection

    def _send_head(self, connection: HTTPConnection) -> None:
        connection.putrequest(self._method, self._link.parts.path, skip_accept_encoding=True)
        length = ("Content-Length", str(self._size))
        kind = [("Content-Type", _PLAIN), ("Overwrite", "t")] if self._method == "PUT" else [("Content-Type", _STREAM)]
        for name, value in (*kind, length):
            connection.putheader(name, value)
        connection.endheaders()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, HTTPException) as error:
            self._check()  # a lease that is lost says more than the connection that was cut with it
            raise self._early_answer() or SourceUnavailable(
                f"The upload broke after {self._sent} bytes: {error or type(error).__name__}",
                self.key,
                "Look at the host and its datastore",
            ) from error

    def _early_answer(self) -> WorkerError | None:
        """What a host that refuses says before it closes."""
        try:
            assert self._connection is not None
            answer = self._connection.getresponse()
        except (OSError, HTTPException):
            return None
        return self._refusal(answer)

    def _refusal(self, answer: HTTPResponse) -> WorkerError:
        status = answer.status
        if status == 404:
            return LeaseLost("The lease's URL is dead (status 404)", self.key, "It is tried again")
        if status in (401, 403):
            return SourceDenied(f"The host refuses us (status {status})", self.key, "Look at the user's privileges")
        what = f"The host answers with status {status} after {self._sent} bytes"
        return SourceUnavailable(what, self.key, "It may be busy, or its datastore full")
