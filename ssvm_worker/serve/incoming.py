"""Uploads over HTTP: a page for people, PUT for curl, and tus 1.0 for what may break on the way.

An upload that breaks stays open for a while: its pipeline waits for the rest. After that, or when this process ends,
what has come lies in a part on the primary store, if that can go on with one, and any process goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from urllib.parse import quote, urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from ssvm_worker.errors import ResourceBusy, SourceUnavailable, WorkerError
from ssvm_worker.ledger.links import Link, job_of
from ssvm_worker.ledger.record import Claim
from ssvm_worker.operations.logs import about
from ssvm_worker.units import KiB

from .push_source import Sender
from .responses import failure, refusal
from .upload_job import Inbox, sender_of
from .upload_page import page
from .uvicorn_protocol import ClientTimeouts

_LOG = logging.getLogger("ssvm.serve")
#: What the pipeline is given at once: less costs a thread's turn more often.
_CHUNK = 512 * KiB
#: Seconds between two looks for links that have ended.
_TIDY_S = 60.0
#: In every answer to a tus client.
TUS = {"Tus-Resumable": "1.0.0", "Cache-Control": "no-store"}
#: Upload-Metadata: keys, each with an optional value in Base64. It is kept in the upload's URL, hence the limit.
_METADATA = re.compile(r"[!-+\--~]+(?: [A-Za-z0-9+/]*={0,2})?(?: ?, ?[!-+\--~]+(?: [A-Za-z0-9+/]*={0,2})?)*")
_METADATA_BYTES = 2 * KiB


class UploadSession:
    """An upload that this process takes."""

    def __init__(self, inbox: Inbox, claim: Claim, sender: Sender) -> None:
        self.sender = sender
        self.task = asyncio.create_task(asyncio.to_thread(inbox.run, claim, sender))
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # somebody has looked

    async def feed(self, chunks: AsyncIterator[bytes]) -> None:
        """Hand on what comes; returns early when the job has ended."""
        held = bytearray()
        try:
            async for chunk in chunks:
                held += chunk
                if len(held) >= _CHUNK and not await self._give(held):
                    return
        finally:  # what has come has come, even if the rest does not
            await self._give(held)

    async def _give(self, held: bytearray) -> bool:
        if not held:
            return True
        chunk = bytes(held)
        held.clear()
        return await asyncio.to_thread(self.sender.give, chunk)

    async def leave(self) -> None:
        """The sender has gone: end, keeping what can be kept."""
        self.sender.leave()
        await asyncio.wait([self.task])


class Uploads:
    """Those that this process takes, by link."""

    def __init__(self, inbox: Inbox, patience: ClientTimeouts) -> None:
        self._inbox = inbox
        self._patience = patience
        self._sessions: dict[str, UploadSession] = {}
        #: Links about which somebody is being answered.
        self._busy: set[str] = set()
        self._idle: dict[str, asyncio.TimerHandle] = {}

    async def answer(self, request: Request, method: str, link: Link, path: str) -> Response:
        """Answer a request about a link that is good; *path* is where clients find it."""
        with about(job_of(link.id)):
            if method == "GET":
                return page(link, await asyncio.to_thread(self._inbox.state, link))
            if method == "PUT":
                return await self._put(request, link)
            if request.headers.get("tus-resumable") != "1.0.0":
                return Response(status_code=412, headers={"Tus-Version": "1.0.0"})
            return await self._tus(request, method, link, path)

    async def _tus(self, request: Request, method: str, link: Link, path: str) -> Response:
        try:
            if method == "POST":
                response = await self._create(request, link, path)
            else:
                acts = {"HEAD": self._tell, "PATCH": self._patch, "DELETE": self._terminate}
                response = await acts[method](request, link)
        except HTTPException as error:
            response = refusal(error)
        except WorkerError as error:
            response = failure(error)
        response.headers["Upload-Expires"] = formatdate(link.until, usegmt=True)
        return response

    def options(self) -> Response:
        """What of tus there is."""
        most = self._inbox.settings.download.max_bytes
        extensions = {"Tus-Version": "1.0.0", "Tus-Extension": "creation,termination,expiration"}
        return Response(status_code=204, headers=extensions | {"Tus-Max-Size": str(most)})

    async def tidy(self) -> None:
        """Again and again, forget links that have ended and what came by them."""
        while True:
            await asyncio.sleep(_TIDY_S)
            try:
                await asyncio.to_thread(self._inbox.end_links)
            except WorkerError as error:
                _LOG.warning("ended links stay for now: %s", error)

    async def close(self) -> None:
        """End all, keeping what can be kept."""
        for handle in self._idle.values():
            handle.cancel()
        for session in list(self._sessions.values()):
            await session.leave()

    # curl -T

    async def _put(self, request: Request, link: Link) -> Response:
        if "content-encoding" in request.headers or "content-range" in request.headers:
            raise HTTPException(400, "Send the file as it is, from its first byte\n")
        length = _number(request, "content-length")
        self._refuse_large(link, length)
        with self._alone(link):
            await self._drop(link)
            await self._refuse_hasty(link)
            await asyncio.to_thread(self._inbox.reset, link)
            session = await self._begin(link, sender_of(link, length))
            try:
                await session.feed(self._body(request, session))
            except SourceUnavailable as error:
                _LOG.info("link %s: %s", link.id, error)
                await session.leave()
                self._sessions.pop(link.id)
                return failure(error)
            return await self._concluded(link, session)

    async def _concluded(self, link: Link, session: UploadSession) -> Response:
        """What became of an upload of which all has come."""
        await asyncio.to_thread(session.sender.give, None)
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
        """Create the one upload of a link; it begins at its first byte, and what had come goes."""
        length, metadata = _number(request, "upload-length"), request.headers.get("upload-metadata", "")
        if length is None:
            raise HTTPException(400, "Upload-Length is missing or no number; it cannot be deferred\n")
        if not length:
            raise HTTPException(400, "Upload-Length is 0: an empty file is no image\n")
        if len(metadata) > _METADATA_BYTES or (metadata and not _METADATA.fullmatch(metadata)):
            raise HTTPException(400, "Upload-Metadata is malformed or too long\n")
        self._refuse_large(link, length)
        with self._alone(link):
            await self._drop(link)
            await self._refuse_hasty(link)
            await asyncio.to_thread(self._inbox.reset, link)
        # Only what the signature covers, and what was checked here: other parameters of the query are not repeated.
        signed = {name: request.query_params[name] for name in ("until", "key", "signature")}
        query = signed | {"length": str(length)} | ({"metadata": metadata} if metadata else {})
        return Response(status_code=201, headers={"Location": f"{path}?{urlencode(query, quote_via=quote)}"})

    async def _tell(self, request: Request, link: Link) -> Response:
        """Where the client must resume."""
        length, metadata = _length(request), request.query_params.get("metadata", "")
        offset = await self._offset(link, length)
        headers = {"Upload-Offset": str(offset), "Upload-Length": str(length)}
        if _METADATA.fullmatch(metadata):
            headers["Upload-Metadata"] = metadata
        return Response(status_code=200, headers=headers)

    async def _offset(self, link: Link, length: int) -> int:
        session = self._sessions.get(link.id)
        if session and session.sender.received == length:
            await asyncio.wait([session.task])  # all has come: whether it is stored is what its sender must hear
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
            raise HTTPException(400, "Upload-Offset is missing or no number\n")
        with self._alone(link):
            if offset != await self._offset(link, length):
                raise HTTPException(409, "That is not where to go on\n")
            if offset == length and await asyncio.to_thread(self._inbox.state, link) == "succeeded":
                return Response(status_code=204, headers={"Upload-Offset": str(length)})  # its sender did not hear it
            session = await self._going_on(link, length, offset)
            try:
                await session.feed(self._body(request, session, length - offset))
            except SourceUnavailable as error:
                _LOG.info("link %s: %s", link.id, error)
            except HTTPException:
                self._await_rest(link)
                raise
            if session.task.done() or session.sender.received == length:
                done = await self._concluded(link, session)
                if done.status_code != 201:
                    return done
            else:
                self._await_rest(link)
            return Response(status_code=204, headers={"Upload-Offset": str(session.sender.received)})

    async def _going_on(self, link: Link, length: int, offset: int) -> UploadSession:
        if handle := self._idle.pop(link.id, None):
            handle.cancel()
        session = self._sessions.get(link.id)
        if session and not session.task.done():
            return session
        if not offset:
            await self._refuse_hasty(link)
        return await self._begin(link, sender_of(link, length, offset, resumable=True))

    def _await_rest(self, link: Link) -> None:
        """Keep the pipeline open for a while."""

        def leave() -> None:
            self._idle.pop(link.id, None)
            if session := self._sessions.pop(link.id, None):
                session.sender.leave()

        self._idle[link.id] = asyncio.get_running_loop().call_later(self._patience.stall_s, leave)

    async def _terminate(self, request: Request, link: Link) -> Response:  # noqa: ARG002 - as the others
        """Termination: the link ends with the upload."""
        with self._alone(link):
            await self._drop(link)
            await asyncio.to_thread(self._inbox.forget, link)
        return Response(status_code=204)

    # Both

    async def _begin(self, link: Link, sender: Sender) -> UploadSession:
        claim = await asyncio.to_thread(self._inbox.claim, link)
        session = self._sessions[link.id] = UploadSession(self._inbox, claim, sender)
        return session

    async def _drop(self, link: Link) -> None:
        """End what waits for its rest: it will not come."""
        if handle := self._idle.pop(link.id, None):
            handle.cancel()
        if session := self._sessions.pop(link.id, None):
            await session.leave()

    @contextlib.contextmanager
    def _alone(self, link: Link) -> Iterator[None]:
        """Nobody else is answered about that link meanwhile."""
        if link.id in self._busy:
            raise ResourceBusy("Somebody else sends this now", link.key, "Wait until that has ended")
        self._busy.add(link.id)
        try:
            yield
        finally:
            self._busy.discard(link.id)

    async def _refuse_hasty(self, link: Link) -> None:
        """429 for a client that begins again and again: each time costs an attempt in the record."""
        if wait_s := await asyncio.to_thread(self._inbox.wait_s, link):
            text = f"The last tries failed. Try again in {wait_s} s\n"
            raise HTTPException(429, text, {"Retry-After": str(wait_s)})

    def _refuse_large(self, link: Link, length: int | None) -> None:
        most = min(link.request.get("max_bytes") or 1 << 62, self._inbox.settings.download.max_bytes)
        if length is not None and length > most:
            raise HTTPException(413, f"{length} bytes are more than the {most} that are allowed\n")

    async def _body(self, request: Request, session: UploadSession, most: int | None = None) -> AsyncIterator[bytes]:
        """What is sent; SourceUnavailable when the sender goes, gives too little, or more than *most* bytes."""
        hearing, seen = _Hearing(request, session.task, self._patience), 0
        while message := await hearing.next():
            chunk = message.get("body", b"")
            seen += len(chunk)
            if most is not None and seen > most:
                raise HTTPException(413, "More than Upload-Length says\n")
            if chunk:
                yield chunk
            if not message.get("more_body"):
                return


class _Hearing:
    """What a sender says. Only the time counts in which we wait for it: that a store is slow is not its fault."""

    def __init__(self, request: Request, job: asyncio.Task[None], patience: ClientTimeouts) -> None:
        self._request = request
        self._job = job
        self._patience = patience
        self._waited, self._heard = 0.0, 0

    async def next(self) -> Message | None:
        """The next piece of the body; None when the job has ended, SourceUnavailable when the sender goes or drips."""
        patience, since = self._patience, time.monotonic()
        heard = asyncio.ensure_future(self._request.receive())
        await asyncio.wait([heard, self._job], timeout=patience.stall_s, return_when=asyncio.FIRST_COMPLETED)
        if not heard.done():
            heard.cancel()
            if self._job.done():
                return None
            raise SourceUnavailable("The sender gives nothing any more", self._request.scope["path"])
        message = heard.result()
        if message["type"] != "http.request":
            raise SourceUnavailable("The sender went away", self._request.scope["path"])
        self._waited += time.monotonic() - since
        self._heard += len(message.get("body", b""))
        if self._waited >= patience.stall_s:
            if self._heard < self._waited * patience.min_rate:
                raise SourceUnavailable("The sender gives too little", self._request.scope["path"])
            self._waited, self._heard = 0.0, 0
        return message


def _number(request: Request, header: str) -> int | None:
    """A header's number; None if it is not there, or none."""
    text = request.headers.get(header, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _length(request: Request) -> int:
    """The upload's, as its creation has put it into its URL."""
    text = request.query_params.get("length", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise HTTPException(404, "There is no upload yet: create it by POST\n")
    return int(text)
