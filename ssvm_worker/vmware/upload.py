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

from .export import ExportLink, connect_to_host

#: Content types: for a disk that the lease has created, and for a file that the upload creates.
_STREAM, _PLAIN = "application/x-vnd.vmware-streamVmdk", "application/octet-stream"


class HostSink:
    """A ``Sink`` over one request. vSphere keeps the data when the lease is completed, and removes it otherwise.

    *size* is the number of bytes to send. With *create*, the upload creates the file (PUT).
    Otherwise, the lease has created it (POST). Methods raise LeaseLost, SourceDenied, SourceUnavailable and
    the errors of *check*. The sink buffers no data.
    """

    offset = 0

    def __init__(self, link: ExportLink, size: int, check: Check, *, create: bool) -> None:
        parts = link.parts
        #: The URL without the secret ticket in its path.
        self.key = f"{parts.netloc}/…/{parts.path.rpartition('/')[2]}"
        self._link = link
        self._size = size
        self._check = check
        self._method = "PUT" if create else "POST"
        self._connection: HTTPConnection | None = None
        self._sent = 0

    def write(self, chunk: bytes) -> None:
        """Send a chunk. The first chunk opens the connection."""
        connection = self._connected()
        with self._translated():
            connection.send(chunk)
        self._sent += len(chunk)

    def resumed(self) -> Iterator[bytes]:
        """Return no data: an upload to a lease cannot be resumed."""
        return iter(())

    def sync(self) -> int:
        """Return 0: an upload to a lease cannot be resumed."""
        return 0

    def commit(self) -> StoredObject:
        """Wait until the host confirms that it has received the file."""
        connection = self._connected()
        with self._translated():
            answer = connection.getresponse()
        if not 200 <= answer.status < 300:
            raise self._refusal(answer)
        self.abort()
        return StoredObject(self.key, self._sent, modified=time.time())

    def abort(self) -> None:
        """Close the connection. vSphere removes the data when the lease is aborted."""
        if self._connection is not None:
            self._connection.close()

    def suspend(self) -> None:
        """Abort: an upload to a lease cannot be resumed."""
        self.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    def _connected(self) -> HTTPConnection:
        if self._connection is None:
            connection = HTTPConnection(self._link.parts.netloc, timeout=TICK)
            connection.response_class = HttpAnswer
            connection.sock = connect_to_host(self._link, self._check)
            self._connection = connection
            headers = (
                {"Content-Type": _STREAM} if self._method == "POST" else {"Content-Type": _PLAIN, "Overwrite": "t"}
            )
            with self._translated():
                connection.putrequest(self._method, self._link.parts.path, skip_accept_encoding=True)
                for name, value in {**headers, "Content-Length": str(self._size)}.items():
                    connection.putheader(name, value)
                connection.endheaders()
        return self._connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, HTTPException) as error:
            self._check()  # prefer the error of a lost lease, which explains the broken connection
            raise self._early_answer() or SourceUnavailable(
                f"The upload broke after {self._sent} bytes: {error or type(error).__name__}",
                self.key,
                "Check the host and its datastore",
            ) from error

    def _early_answer(self) -> WorkerError | None:
        """Return the error from the answer that a host sends before it closes the connection, or None."""
        try:
            assert self._connection is not None
            answer = self._connection.getresponse()
        except (OSError, HTTPException):
            return None
        return self._refusal(answer)

    def _refusal(self, answer: HTTPResponse) -> WorkerError:
        status = answer.status
        if status == 404:
            return LeaseLost("The lease's URL has expired (status 404)", self.key, "The worker tries again")
        if status in (401, 403):
            return SourceDenied(f"The host denies access (status {status})", self.key, "Check the user's privileges")
        what = f"The host answered with status {status} after {self._sent} bytes"
        return SourceUnavailable(what, self.key, "The host may be busy, or its datastore may be full")
