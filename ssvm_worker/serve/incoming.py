"""Uploads over HTTP: a page for people, PUT for curl, and tus 1.0 for resumable uploads.

After a broken connection the pipeline stays open for stall_s seconds and waits for the rest. After this time, or when
this process ends, the received bytes stay in a part on the primary store. Any process can resume from this part, if
the store can resume parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from email.utils import formatdate
from urllib.parse import quote, urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ssvm_worker.config.serve_section import ServeSection
from ssvm_worker.errors import ResourceBusy, SourceUnavailable, WorkerError
from ssvm_worker.ledger.links import Link, job_of
from ssvm_worker.ledger.record import Claim
from ssvm_worker.operations.logs import about
from ssvm_worker.units import KiB

from .pages import upload_page
from .push_source import Sender
from .responses import failure, refusal
from .upload_job import Inbox, sender_of

_LOG = logging.getLogger("ssvm.serve")
#: Bytes that are passed to the pipeline at once. Smaller chunks switch threads more often.
_CHUNK = 512 * KiB
#: Seconds between two searches for links that have ended.
_END_LINKS_S = 60.0
#: Headers of every response to a tus client.
TUS = {"Tus-Resumable": "1.0.0", "Cache-Control": "no-store"}
#: Upload-Metadata: keys, each with an optional value in Base64. It has a limit, because it is part of the upload's URL.
_METADATA = re.compile(r"[!-+\--~]+(?: [A-Za-z0-9+/]*={0,2})?(?: ?, ?[!-+\--~]+(?: [A-Za-z0-9+/]*={0,2})?)*")
_METADATA_BYTES = 2 * KiB
#: Takes the one file out of the body of a request.
Form = Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]]


class UploadSession:
    """An upload that this process receives."""

    def __init__(self, inbox: Inbox, claim: Claim, sender: Sender) -> None:
        self.sender = sender
        self.task = asyncio.create_task(asyncio.to_thread(inbox.run, claim, sender))
        # Retrieve the exception, so that asyncio does not log it as lost.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def feed(self, chunks: AsyncIterator[bytes]) -> None:
        """Pass the chunks to the job. Return early if the job has ended."""
        buffer = bytearray()
        try:
            async for chunk in chunks:
                buffer += chunk
                if len(buffer) >= _CHUNK and not await self._pass_on(buffer):
                    return
        finally:  # pass on the received bytes even if the rest does not arrive
            await self._pass_on(buffer)

    async def _pass_on(self, buffer: bytearray) -> bool:
        if not buffer:
            return True
        chunk = bytes(buffer)
        buffer.clear()
        return await asyncio.to_thread(self.sender.put, chunk)

    async def leave(self) -> None:
        """End the job after the client disconnected. The job keeps received bytes if it can resume."""
        self.sender.disconnect()
        await asyncio.wait([self.task])


class Uploads:
    """The uploads that this process receives, by link."""

    def __init__(self, inbox: Inbox, limits: ServeSection) -> None:
        self._inbox = inbox
        self._limits = limits
        self._sessions: dict[str, UploadSession] = {}
        #: Links with a request in progress.
        self._busy: set[str] = set()
        self._idle: dict[str, asyncio.TimerHandle] = {}

    async def answer(self, request: Request, method: str, link: Link, path: str) -> Response:
        """Answer a request with a valid link. *path* is the path at which clients reach the link."""
        with about(job_of(link.id)):
            if method == "GET":
                return upload_page(link, await asyncio.to_thread(self._inbox.state, link), self._max_bytes(link))
            if method == "PUT":
                return await self.put(request, link)
            if request.headers.get("tus-resumable") != "1.0.0":
                return Response(status_code=412, headers={"Tus-Version": "1.0.0"})
            return await self._tus(request, method, link, path)

    async def _tus(self, request: Request, method: str, link: Link, path: str) -> Response:
        try:
            if method == "POST":
                response = await self._create(request, link, path)
            else:
                acts = {"HEAD": self._report_offset, "PATCH": self._patch, "DELETE": self._terminate}
                response = await acts[method](request, link)
        except HTTPException as error:
            response = refusal(error)
        except WorkerError as error:
            response = failure(error)
        response.headers["Upload-Expires"] = formatdate(link.until, usegmt=True)
        return response

    def options(self) -> Response:
        """Return the supported extensions of tus."""
        max_bytes = self._inbox.settings.download.max_bytes
        extensions = {"Tus-Version": "1.0.0", "Tus-Extension": "creation,termination,expiration"}
        return Response(status_code=204, headers=extensions | {"Tus-Max-Size": str(max_bytes)})

    async def end_links_forever(self) -> None:
        """Every minute, remove ended links and the data that arrived through them. Run until cancelled."""
        while True:
            await asyncio.sleep(_END_LINKS_S)
            try:
                await asyncio.to_thread(self._inbox.end_links)
            except WorkerError as error:
                _LOG.warning("cannot remove ended links now: %s", error)

    async def close(self) -> None:
        """End all uploads. The jobs keep received bytes if they can resume."""
        for handle in self._idle.values():
            handle.cancel()
        for session in list(self._sessions.values()):
            await session.leave()

    # A complete file in one request: PUT, as by `curl -T`, or a form

    async def put(self, request: Request, link: Link, form: Form | None = None) -> Response:
        """Store the file that is the body of the request, or that *form* takes out of it."""
        if "content-encoding" in request.headers or "content-range" in request.headers:
            raise HTTPException(400, "Send the complete file without Content-Encoding and Content-Range\n")
        length = None if form else _number(request, "content-length")
        self._check_size(link, length)
        with self._exclusive(link):
            await self._end_session(link)
            await self._check_rate(link)
            await asyncio.to_thread(self._inbox.reset, link)
            session = await self._start_session(link, sender_of(link, length))
            body = self._body(request, session)
            try:
                await session.feed(form(body) if form else body)
            except (SourceUnavailable, HTTPException) as error:
                _LOG.info("link %s: %s", link.id, error)
                await session.leave()
                self._sessions.pop(link.id)
                if isinstance(error, HTTPException):
                    raise
                return failure(error)
            return await self._finish(link, session)

    async def _finish(self, link: Link, session: UploadSession) -> Response:
        """Wait for the end of the job after the last byte, and return its result or its error."""
        await asyncio.to_thread(session.sender.put, None)
        try:
            await session.task
        except WorkerError as error:
            return failure(error, sent=True)
        finally:
            self._sessions.pop(link.id, None)
        record = await asyncio.to_thread(self._inbox.ledger.get, link.job_id)
        return JSONResponse({"job_id": link.job_id, **(record.result or {})}, 201)

    # tus

    async def _create(self, request: Request, link: Link, path: str) -> Response:
        """Create the one upload of a link, and remove the bytes of an earlier one. The job starts at the first byte."""
        length, metadata = _number(request, "upload-length"), request.headers.get("upload-metadata", "")
        if length is None:
            raise HTTPException(400, "Upload-Length must be a number; deferring it is not supported\n")
        if not length:
            raise HTTPException(400, "Upload-Length must not be 0\n")
        if len(metadata) > _METADATA_BYTES or (metadata and not _METADATA.fullmatch(metadata)):
            raise HTTPException(400, "Upload-Metadata is malformed or too long\n")
        self._check_size(link, length)
        with self._exclusive(link):
            await self._end_session(link)
            await self._check_rate(link)
            await asyncio.to_thread(self._inbox.reset, link)
        # Repeat only the parameters that the signature covers or that were checked here.
        signed = {name: request.query_params[name] for name in ("until", "key", "signature")}
        query = signed | {"length": str(length)} | ({"metadata": metadata} if metadata else {})
        return Response(status_code=201, headers={"Location": f"{path}?{urlencode(query, quote_via=quote)}"})

    async def _report_offset(self, request: Request, link: Link) -> Response:
        """Return the offset at which the client must resume."""
        length, metadata = _length(request), request.query_params.get("metadata", "")
        offset = await self._offset(link, length)
        headers = {"Upload-Offset": str(offset), "Upload-Length": str(length)}
        if _METADATA.fullmatch(metadata):
            headers["Upload-Metadata"] = metadata
        return Response(status_code=200, headers=headers)

    async def _offset(self, link: Link, length: int) -> int:
        session = self._sessions.get(link.id)
        if session and session.sender.received == length:
            await asyncio.wait([session.task])  # the client needs the outcome of a complete upload
        if session and not session.task.done():
            return session.sender.received
        if await asyncio.to_thread(self._inbox.state, link) == "succeeded":
            return length
        return await asyncio.to_thread(self._inbox.stored, link, length)

    async def _patch(self, request: Request, link: Link) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/offset+octet-stream":
            raise HTTPException(415, "Content-Type must be application/offset+octet-stream\n")
        length, offset = _length(request), _number(request, "upload-offset")
        if offset is None:
            raise HTTPException(400, "Upload-Offset must be a number\n")
        with self._exclusive(link):
            if offset != await self._offset(link, length):
                raise HTTPException(409, "Upload-Offset is not the current offset. Query it with HEAD\n")
            if offset == length and await asyncio.to_thread(self._inbox.state, link) == "succeeded":
                return Response(status_code=204, headers={"Upload-Offset": str(length)})  # the first response got lost
            session = await self._resume_session(link, length, offset)
            try:
                await session.feed(self._body(request, session, length - offset))
            except SourceUnavailable as error:
                _LOG.info("link %s: %s", link.id, error)
            except HTTPException:
                self._keep_open(link)
                raise
            if session.task.done() or session.sender.received == length:
                response = await self._finish(link, session)
                if response.status_code != 201:
                    return response
            else:
                self._keep_open(link)
            return Response(status_code=204, headers={"Upload-Offset": str(session.sender.received)})

    async def _resume_session(self, link: Link, length: int, offset: int) -> UploadSession:
        if handle := self._idle.pop(link.id, None):
            handle.cancel()
        session = self._sessions.get(link.id)
        if session and not session.task.done():
            return session
        if not offset:
            await self._check_rate(link)
        return await self._start_session(link, sender_of(link, length, offset, resumable=True))

    def _keep_open(self, link: Link) -> None:
        """Keep the pipeline open for stall_s seconds."""

        def disconnect() -> None:
            self._idle.pop(link.id, None)
            if session := self._sessions.pop(link.id, None):
                session.sender.disconnect()

        self._idle[link.id] = asyncio.get_running_loop().call_later(self._limits.stall_s, disconnect)

    async def _terminate(self, request: Request, link: Link) -> Response:  # noqa: ARG002 - same signature as the other methods
        """End the upload and revoke its link."""
        with self._exclusive(link):
            await self._end_session(link)
            await asyncio.to_thread(self._inbox.forget, link)
        return Response(status_code=204)

    # PUT and tus

    async def _start_session(self, link: Link, sender: Sender) -> UploadSession:
        claim = await asyncio.to_thread(self._inbox.claim, link)
        session = self._sessions[link.id] = UploadSession(self._inbox, claim, sender)
        return session

    async def _end_session(self, link: Link) -> None:
        """End a session that waits for the rest of its upload."""
        if handle := self._idle.pop(link.id, None):
            handle.cancel()
        if session := self._sessions.pop(link.id, None):
            await session.leave()

    @contextlib.contextmanager
    def _exclusive(self, link: Link) -> Iterator[None]:
        """Refuse other requests with this link while the block runs. Raise ResourceBusy if one is in progress."""
        if link.id in self._busy:
            raise ResourceBusy("Another upload of this file is in progress", link.key, "Retry when it has finished")
        self._busy.add(link.id)
        try:
            yield
        finally:
            self._busy.discard(link.id)

    async def _check_rate(self, link: Link) -> None:
        """Answer 429 to a client that restarts too often. Each start uses one attempt of the job."""
        if wait_s := await asyncio.to_thread(self._inbox.wait_s, link):
            text = f"The last attempts failed. Retry in {wait_s} s\n"
            raise HTTPException(429, text, {"Retry-After": str(wait_s)})

    def _max_bytes(self, link: Link) -> int:
        limit = self._inbox.settings.download.max_bytes
        return min(link.request.get("max_bytes") or limit, limit)

    def _check_size(self, link: Link, length: int | None) -> None:
        max_bytes = self._max_bytes(link)
        if length is not None and length > max_bytes:
            raise HTTPException(413, f"The file has {length} bytes; the limit is {max_bytes}\n")

    async def _body(
        self, request: Request, session: UploadSession, max_bytes: int | None = None
    ) -> AsyncIterator[bytes]:
        """Yield the chunks of the request's body, until it ends or the job ends.

        Raises SourceUnavailable if the client disconnects or is too slow, and HTTPException 413 after *max_bytes*.
        Only the time counts during which we wait for the client, not the time of a slow store.
        """
        limits, path = self._limits, request.scope["path"]
        size, waited_s, arrived, more = 0, 0.0, 0, True
        while more:
            started = time.monotonic()
            receiving = asyncio.ensure_future(request.receive())
            await asyncio.wait([receiving, session.task], timeout=limits.stall_s, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                receiving.cancel()
                if session.task.done():
                    return
                raise SourceUnavailable("The client stopped sending", path)
            message = receiving.result()
            if message["type"] != "http.request":
                raise SourceUnavailable("The client disconnected", path)
            chunk, more = message.get("body", b""), message.get("more_body", False)
            waited_s, arrived = waited_s + time.monotonic() - started, arrived + len(chunk)
            if waited_s >= limits.stall_s:
                if arrived < waited_s * limits.min_rate:
                    raise SourceUnavailable("The client sends too slowly", path)
                waited_s, arrived = 0.0, 0
            size += len(chunk)
            if max_bytes is not None and size > max_bytes:
                raise HTTPException(413, "The body is longer than Upload-Length\n")
            if chunk:
                yield chunk


def _number(request: Request, header: str) -> int | None:
    """Return the number in a header; None if the header is missing or not a number."""
    text = request.headers.get(header, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _length(request: Request) -> int:
    """Return the length of an upload. The creation of the upload puts it into the URL."""
    text = request.query_params.get("length", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise HTTPException(404, "This upload does not exist. Create it with POST\n")
    return int(text)
