"""One object of an artifact, from the file in which a directory store keeps it to whoever has its link."""

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
from ssvm_worker.jobs.served_objects import member
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import KiB

from .conditional import Answer, ObjectVersion, answer
from .uvicorn_protocol import EXTENSION

#: Where something encrypts; each must be taken within stall_s.
_CHUNK = 256 * KiB


@runtime_checkable
class Directory(Protocol):
    """A store whose objects are files."""

    def handle(self, key: str) -> int:
        """A handle of the object's file, which the caller closes."""


@dataclass
class Offered:
    """An object that is open; ``close`` it."""

    entry: Entry
    handle: int
    version: ObjectVersion

    @classmethod
    def open(cls, store: Store, key: str) -> Offered:
        """Find it by its manifest and open its file, which no symbolic link leads to; CorruptImage if they differ."""
        entry = member(store, key)
        assert isinstance(store, Directory)
        handle = store.handle(key)
        seen = os.fstat(handle)
        if seen.st_size != entry.size:
            os.close(handle)
            what = f"The file has {seen.st_size} bytes, and {entry.size} by its manifest"
            raise CorruptImage(what, f"{store.name}:{key}", "`ssvm verify` it")
        return cls(entry, handle, ObjectVersion(f'"{entry.digest}"', entry.size, int(seen.st_mtime)))

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
            part = {"file": self.handle, "offset": found.offset, "count": found.count}
            await send({"type": EXTENSION, **part})
        else:
            await self._send_chunks(found.offset, found.count if request.method == "GET" else 0, send)

    def _headers(self, found: Answer) -> dict[str, str]:
        headers = self.version.headers | {"Accept-Ranges": "bytes", "Cache-Control": "private, no-transform"}
        if found.status in (200, 206):
            headers |= {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(found.count),
                "Content-Disposition": f'attachment; filename="{self.entry.name}"',  # keys hold no quotes
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
        """By hand, where something encrypts."""
        left = count
        while left:
            chunk = await asyncio.to_thread(os.pread, self.handle, min(_CHUNK, left), offset + count - left)
            if not chunk:
                raise ConnectionError("the file is shorter than it was")
            left -= len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
