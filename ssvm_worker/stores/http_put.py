"""Upload with one HTTP PUT: to a presigned S3 URL, or to any server that stores the body."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Mapping
from http.client import HTTPException

from ssvm_worker.errors import ObjectNotFound, StoreDenied, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.net.http import HttpOptions, HttpResponse, HttpSession, HttpUpload, wait_wanted
from ssvm_worker.net.sockets import AddressRefused
from ssvm_worker.net.urls import check_headers, parse
from ssvm_worker.streaming.interfaces import CannotResume, Check, StoredObject
from ssvm_worker.units import KiB

#: The error code in the XML answer of an S3 server.
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")


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
        options: HttpOptions,
        *,
        headers: Mapping[str, str] | None = None,
        check: Check = lambda: None,
    ) -> None:
        """Raise InvalidRequest for an invalid URL or header. The first write connects."""
        self._url = parse(url)
        self._headers = check_headers(headers or {})
        self._size = size
        self._session = HttpSession(options, check)
        self._upload: HttpUpload | None = None
        self._taken = 0
        self._held = b""
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

    def _send(self, chunk: bytes) -> HttpUpload:
        try:
            if self._upload is None:
                self._upload = HttpUpload(self._session, "PUT", self._url, self._headers, self._size)
            answer = self._upload.send(chunk) if chunk else None
        except (OSError, HTTPException) as error:
            raise self._broken(error) from error
        if answer is None:
            return self._upload
        if answer.status_code < 300:
            what = f"The server answered {answer.status_code} after {self._sent} of {self._size} bytes"
            raise StoreUnavailable(what, self.key, "Check the server")
        raise self._refusal(answer)

    @property
    def _sent(self) -> int:
        return self._upload.sent if self._upload else 0

    def commit(self) -> StoredObject:
        """Send the last chunk and wait for the answer. The size is the number of sent bytes: PUT cannot read it."""
        if self._taken != self._size:
            raise ValueError(f"{self._taken} of the {self._size} bytes promised to {self.key}")
        upload = self._send(self._held)
        try:
            answer = upload.finish()
        except (OSError, HTTPException) as error:
            raise self._broken(error) from error
        if not 200 <= answer.status_code < 300:
            raise self._refusal(answer)
        self.abort()
        return StoredObject(self.key, self._size, modified=time.time())

    def abort(self) -> None:
        """Close the connection."""
        self._session.close()

    def _refusal(self, answer: HttpResponse) -> WorkerError:
        """Return the error for a status other than 2xx. The message has the server's own error code."""
        try:
            match = _CODE.search(answer.read(4 * KiB))
        except (OSError, HTTPException):  # the status is enough
            match = None
        error = _status_error(answer.status_code, self.key, match[1].decode() if match else "")
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
