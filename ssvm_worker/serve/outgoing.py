"""Sends one object of an artifact from the file of a directory store to the holder of a link."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from urllib.parse import quote

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ssvm_worker.artifacts.manifest import Entry
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.jobs.upload.job import read_entry
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import KiB

from .conditional import ConditionalAnswer, ObjectVersion, answer
from .uvicorn_protocol import EXTENSION

_LOG = logging.getLogger("ssvm.serve")
#: Bytes in one write of a TLS connection. The client must read each chunk within stall_s.
_CHUNK = 256 * KiB


@runtime_checkable
class Directory(Protocol):
    """Stores whose objects are files."""

    def handle(self, key: str) -> int:
        """Return a file descriptor of the object's file. The caller closes it."""


@dataclass
class ServedObject:
    """An open object. ``serve`` closes it."""

    #: The name of the file for the client.
    name: str
    #: ``sha256:HEX``, or "" for an object that no manifest lists.
    digest: str
    handle: int
    version: ObjectVersion

    @classmethod
    def open(cls, store: Store, key: str) -> ServedObject:
        """Find an object by its manifest and open its file without following symbolic links.

        Raises CorruptImage if the file's size differs from the manifest's.
        """
        return cls._open(store, key, read_entry(store, key))

    @classmethod
    def open_unlisted(cls, store: Store, key: str, name: str) -> ServedObject:
        """Open an object that may have no manifest, because another program wrote it. *name* is for the client."""
        try:
            found = cls.open(store, key)
        except ObjectNotFound:
            found = cls._open(store, key, None)
        found.name = name
        return found

    @classmethod
    def _open(cls, store: Store, key: str, entry: Entry | None) -> ServedObject:
        if not isinstance(store, Directory):
            raise ObjectNotFound("This store cannot serve files", f"{store.name}:{key}", "Fetch it from the store")
        handle = store.handle(key)
        stat = os.fstat(handle)
        if entry and stat.st_size != entry.size:
            os.close(handle)
            what = f"The file has {stat.st_size} bytes, but its manifest says {entry.size}"
            raise CorruptImage(what, f"{store.name}:{key}", "Run `ssvm verify` on the artifact")
        digest = entry.digest if entry else ""
        etag = digest or f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"
        version = ObjectVersion(f'"{etag}"', stat.st_size, int(stat.st_mtime))
        return cls(key.rpartition("/")[2], digest, handle, version)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD, and close the file."""
        try:
            await self._answer(scope, receive, send)
        except ConnectionError as error:
            _LOG.info("the transfer of %s has ended early: %s", self.name, error)
        finally:
            await asyncio.to_thread(os.close, self.handle)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        found = answer(request.method, request.headers, self.version)
        headers = self._headers(found)
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": found.status, "headers": raw})
        if EXTENSION in scope.get("extensions", {}) and found.count and request.method == "GET":
            await send({"type": EXTENSION, "file": self.handle, "offset": found.offset, "count": found.count})
        else:
            await self._send_chunks(found.offset, found.count if request.method == "GET" else 0, send)

    def _headers(self, found: ConditionalAnswer) -> dict[str, str]:
        headers = self.version.headers | {"Accept-Ranges": "bytes", "Cache-Control": "private, no-transform"}
        if found.status in (200, 206):
            headers |= {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(found.count),
                "Content-Disposition": _disposition(self.name),
            }
            if self.digest:
                digest = base64.b64encode(bytes.fromhex(self.digest[7:])).decode()
                headers["Repr-Digest"] = f"sha-256=:{digest}:"
        elif found.status != 304:
            headers["Content-Length"] = "0"
        if found.status == 206:
            headers["Content-Range"] = f"bytes {found.offset}-{found.offset + found.count - 1}/{self.version.size}"
        if found.status == 416:
            headers["Content-Range"] = f"bytes */{self.version.size}"
        return headers

    async def _send_chunks(self, offset: int, count: int, send: Send) -> None:
        """Send without sendfile, which cannot encrypt."""
        end = offset + count
        while offset < end:
            chunk = await asyncio.to_thread(os.pread, self.handle, min(_CHUNK, end - offset), offset)
            if not chunk:
                raise ConnectionError("the file was truncated while it was sent")
            offset += len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _disposition(name: str) -> str:
    """Return the header that names the file. Names outside ASCII follow RFC 8187."""
    if name.isascii() and not set(name) & set('\\"'):
        return f'attachment; filename="{name}"'
    return f"attachment; filename*=UTF-8''{quote(name, safe='')}"
