"""Sends one object of an artifact from the file of a directory store to the holder of a link."""

from __future__ import annotations

import asyncio
import base64
import os
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from ssvm_worker.artifacts.manifest import Entry
from ssvm_worker.errors import CorruptImage
from ssvm_worker.jobs.upload.job import read_entry
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import KiB

from .conditional import ConditionalAnswer, ObjectVersion, answer
from .uvicorn_protocol import EXTENSION

#: Bytes in one write of a TLS connection. The client must read each chunk within stall_s.
_CHUNK = 256 * KiB


@runtime_checkable
class Directory(Protocol):
    """Stores whose objects are files."""

    def handle(self, key: str) -> int:
        """Return a file descriptor of the object's file. The caller closes it."""


@dataclass
class ServedObject:
    """An open object. The caller must ``close`` it."""

    entry: Entry
    handle: int
    version: ObjectVersion

    @classmethod
    def open(cls, store: Store, key: str) -> ServedObject:
        """Find an object by its manifest and open its file without following symbolic links.

        Raises CorruptImage if the file's size differs from the manifest's.
        """
        entry = read_entry(store, key)
        assert isinstance(store, Directory)
        handle = store.handle(key)
        stat = os.fstat(handle)
        if stat.st_size != entry.size:
            os.close(handle)
            what = f"The file has {stat.st_size} bytes, but its manifest says {entry.size}"
            raise CorruptImage(what, f"{store.name}:{key}", "Run `ssvm verify` on the artifact")
        return cls(entry, handle, ObjectVersion(f'"{entry.digest}"', entry.size, int(stat.st_mtime)))

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD."""
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
                "Content-Disposition": f'attachment; filename="{self.entry.name}"',  # keys contain no quotes
                "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(self.entry.digest[7:])).decode()}:",
            }
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
