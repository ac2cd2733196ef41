"""What is answered at which path, and to whom: the signature comes first, then the ledger, then the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import Receive, Scope, Send

from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.links import GET, Link, Signer, object_path, upload_path
from ssvm_worker.ledger.links.redis import LinkBook
from ssvm_worker.streaming.interfaces import Store

from .incoming import TUS, Uploads
from .outgoing import Offered
from .responses import failure, refusal, respond
from .uvicorn_protocol import KEEP

_LOG = logging.getLogger("ssvm.serve")
#: Of uploads.
METHODS = ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS")
#: The same words for every link that is not good, whatever is wrong with it: who guesses learns nothing.
_NO_LINK = "This link is not valid. Ask for a new one.\n"
_OVER = "This link has expired or was revoked. Ask for a new one.\n"


@dataclass(frozen=True)
class Gate:
    """Who may come in: the bearer of a link that is signed, has not expired, and stands in the book."""

    signer: Signer
    book: LinkBook

    async def admit(self, request: Request, path: str) -> Link:
        """The link behind the request; HTTPException 403, 410, or 503 while the ledger is away."""
        if not self.signer.is_signed(path, request.query_params):
            raise HTTPException(403, _NO_LINK)
        request.scope[KEEP]()
        if int(request.query_params["until"]) <= time.time():
            raise HTTPException(410, _OVER)
        link = await asyncio.to_thread(self.book.find, request.path_params["id"])
        if link is None or link.path != path:
            raise HTTPException(410, _OVER)
        return link


@dataclass(frozen=True)
class Objects:
    """GET and HEAD of objects."""

    gate: Gate
    stores: Mapping[str, Store]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        given = request.path_params
        path = object_path(given["id"], given["store"], given["key"])
        link = await self.gate.admit(request, path)
        if link.verb != GET or link.store not in self.stores:
            raise HTTPException(410, _OVER)
        offered = await asyncio.to_thread(Offered.open, self.stores[link.store], link.key)
        try:
            await offered(scope, receive, send)
        except ConnectionError as error:
            _LOG.info("link %s: %s", link.id, error)
        finally:
            await asyncio.to_thread(offered.close)


def make_app(gate: Gate, stores: Mapping[str, Store], uploads: Uploads, prefix: str = "") -> Starlette:
    """The whole service; it answers below *prefix* too, for a proxy that does not take that off."""
    routes: list[BaseRoute] = [
        Route("/health", _health, methods=["GET"]),
        Route("/get/{id}/{store}/{key:path}", Objects(gate, stores), methods=["GET", "HEAD"]),
        Route("/put/{id}", Incoming(gate, uploads, prefix), methods=METHODS),
    ]
    if prefix:
        routes.append(Mount(prefix, routes=list(routes)))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tidying = asyncio.create_task(uploads.tidy())
        yield
        tidying.cancel()
        await uploads.close()

    handlers = {HTTPException: _refused, WorkerError: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False  # it would redirect to whatever host the request names
    return app


@dataclass(frozen=True)
class Incoming:
    """Uploads."""

    gate: Gate
    uploads: Uploads
    prefix: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        # tus 1.0: the header is the method, for clients that cannot send PATCH.
        method = request.headers.get("x-http-method-override", request.method).upper()
        try:
            response = await self._answer(request, method)
        except HTTPException as error:
            response = await _refused(request, error)
        except WorkerError as error:
            response = await _failed(request, error)
        if method not in ("GET", "PUT"):
            response.headers.update(TUS)
        await respond(request, response, send)

    async def _answer(self, request: Request, method: str) -> Response:
        if method == "OPTIONS":
            return self.uploads.options()
        path = upload_path(request.path_params["id"])
        link = await self.gate.admit(request, path)
        if method not in METHODS:
            raise HTTPException(405, "There is no such method here\n", {"Allow": ", ".join(METHODS)})
        return await self.uploads.answer(request, method, link, self.prefix + path)


async def _health(_: Request) -> Response:
    """That it answers; what lies behind it is what ``ssvm doctor`` looks at."""
    return PlainTextResponse("ok\n")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error)


async def _failed(request: Request, error: Exception) -> Response:
    """What went wrong, as the shell says it with --json; whoever holds a link may read it."""
    assert isinstance(error, WorkerError)
    _LOG.warning("%s %s: %s", request.method, request.scope["path"], error)
    return failure(error)
