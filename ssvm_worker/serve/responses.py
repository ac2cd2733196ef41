"""Responses for errors, and the delivery of a response to a client that still sends its request."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Send

from ssvm_worker.errors import Permanent, ResourceBusy, Retryable, WorkerError
from ssvm_worker.units import MiB

#: HTTP statuses by the name of the error, because the ledger has only the name of an upload's error.
_STATUS_BY_NAME = {
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
#: Limits for draining a request that was refused before its end. Closing a connection with unread bytes resets it,
#: and the client may lose the response.
_LINGER_S, _LINGER_BYTES = 5.0, 16 * MiB


def failure(error: WorkerError, *, sent: bool = False) -> Response:
    """Return the error object with the matching status. *sent*: the error is about data that the client sent."""
    name = str(error.as_dict()["error"])
    if sent and name == "CorruptImage":
        status = 422
    elif isinstance(error, ResourceBusy) or name == "ResourceBusy":
        status = 423
    elif isinstance(error, Retryable) or error.as_dict()["retryable"]:
        status = 503
    else:
        status = _STATUS_BY_NAME.get(name, 500 if isinstance(error, Permanent) else 503)
    headers = {"Retry-After": "5"} if status in (423, 503) else None
    return JSONResponse(error.as_dict(), status, headers=headers)


def refusal(error: HTTPException) -> Response:
    """Return a plain-text response, for people and for clients that read only the status."""
    return PlainTextResponse(str(error.detail).rstrip("\n") + "\n", error.status_code, headers=error.headers)


async def respond(request: Request, response: Response, send: Send) -> None:
    """Send a response. For an error, first read the rest of the request, so that the client reads the response.

    The reading stops after 5 seconds or 16 MiB.
    """
    if response.status_code < 400:
        await response(request.scope, request.receive, send)
        return

    async def drain() -> None:
        drained = 0
        while drained < _LINGER_BYTES:
            message = await request.receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                return
            drained += len(message.get("body", b""))

    async def send_and_drain(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(drain(), _LINGER_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await response(request.scope, request.receive, send_and_drain)
