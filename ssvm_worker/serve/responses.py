"""Errors as answers, and how an answer is given to somebody who is still sending."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Send

from ssvm_worker.errors import Permanent, ResourceBusy, Retryable, WorkerError
from ssvm_worker.units import MiB

#: By the name of the error, as an upload's comes out of the ledger; else by its kind.
_BY_NAME = {
    "ObjectNotFound": 404,
    "InvalidRequest": 409,
    "Cancelled": 410,
    "TooLarge": 413,
    "ChecksumMismatch": 422,
    "UnknownFormat": 422,
    "AmbiguousFormat": 422,
    "UnsafeImage": 422,
    "ImageError": 422,
    "QuotaExceeded": 507,
    "StoreFull": 507,
}
#: Seconds and bytes for which more is taken from somebody who was answered before the end of what it sends: a
#: connection that is closed upon unread bytes is reset, and the answer may be lost with it.
_LINGER_S, _LINGER_BYTES = 5.0, 16 * MiB


def failure(error: WorkerError, *, sent: bool = False) -> Response:
    """The error object with the status that says the same; *sent*: it is about what was sent to us."""
    name = str(error.as_dict()["error"])
    if sent and name == "CorruptImage":
        status = 422
    elif isinstance(error, ResourceBusy) or name == "ResourceBusy":
        status = 423
    elif isinstance(error, Retryable) or error.as_dict()["retryable"]:
        status = 503
    else:
        status = _BY_NAME.get(name, 500 if isinstance(error, Permanent) else 503)
    headers = {"Retry-After": "5"} if status in (423, 503) else None
    return JSONResponse(error.as_dict(), status, headers=headers)


def refusal(error: HTTPException) -> Response:
    """What is said without an error object: to people, and to clients that look at the status alone."""
    return PlainTextResponse(str(error.detail).rstrip("\n") + "\n", error.status_code, headers=error.headers)


async def respond(request: Request, response: Response, send: Send) -> None:
    """Send the answer. A refusal waits a while for the rest of the request, so that the client reads it."""
    if response.status_code < 400:
        await response(request.scope, request.receive, send)
        return

    async def lingering(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_drain(request), _LINGER_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await response(request.scope, request.receive, lingering)


async def _drain(request: Request) -> None:
    seen = 0
    while seen < _LINGER_BYTES:
        message = await request.receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        seen += len(message.get("body", b""))
