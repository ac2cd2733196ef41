"""The data stream of one file of a new VM: an HTTPS PUT or POST to the host that the lease names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Self

from ssvm_worker.errors import LeaseLost, SourceDenied, SourceUnavailable, WorkerError
from ssvm_worker.net.http import HttpResponse, HttpSession, HttpUpload
from ssvm_worker.streaming.interfaces import Check, StoredObject

from .export import ExportLink, translated_stream

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
        self._session = HttpSession(link.options, check)
        self._upload: HttpUpload | None = None

    def write(self, chunk: bytes) -> None:
        """Send a chunk. The first chunk opens the connection."""
        with translated_stream(self.key, self._check, f"The upload broke after {self._sent} bytes"):
            answer = self._connected().send(chunk)
        if answer is not None:
            self._check()  # prefer the error of a lost lease, which explains the early answer
            raise self._refusal(answer)

    def resumed(self) -> Iterator[bytes]:
        """Return no data: an upload to a lease cannot be resumed."""
        return iter(())

    def sync(self) -> int:
        """Return 0: an upload to a lease cannot be resumed."""
        return 0

    def commit(self) -> StoredObject:
        """Wait until the host confirms that it has received the file."""
        with translated_stream(self.key, self._check, f"The upload broke after {self._sent} bytes"):
            answer = self._connected().finish()
        if not 200 <= answer.status_code < 300:
            raise self._refusal(answer)
        self.abort()
        return StoredObject(self.key, self._sent, modified=time.time())

    def abort(self) -> None:
        """Close the connection. vSphere removes the data when the lease is aborted."""
        self._session.close()

    def suspend(self) -> None:
        """Abort: an upload to a lease cannot be resumed."""
        self.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    def _connected(self) -> HttpUpload:
        if self._upload is None:
            headers = (
                {"Content-Type": _STREAM} if self._method == "POST" else {"Content-Type": _PLAIN, "Overwrite": "t"}
            )
            self._upload = HttpUpload(self._session, self._method, self._link.web_url, headers, self._size)
        return self._upload

    @property
    def _sent(self) -> int:
        return self._upload.sent if self._upload else 0

    def _refusal(self, answer: HttpResponse) -> WorkerError:
        status = answer.status_code
        if status == 404:
            return LeaseLost("The lease's URL has expired (status 404)", self.key, "The worker tries again")
        if status in (401, 403):
            return SourceDenied(f"The host denies access (status {status})", self.key, "Check the user's privileges")
        what = f"The host answered with status {status} after {self._sent} bytes"
        return SourceUnavailable(what, self.key, "The host may be busy, or its datastore may be full")
