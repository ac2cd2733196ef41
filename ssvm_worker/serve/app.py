"""The routes of the service. Each request is checked by its signature, then in the ledger, then in the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
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
from .outgoing import ServedObject
from .pages import error_page, is_for_people
from .responses import failure, refusal, respond
from .uvicorn_protocol import KEEP

_LOG = logging.getLogger("ssvm.serve")
#: The methods of uploads.
METHODS = ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS")
#: The same text for every invalid link, so that an attacker learns nothing from it.
_NO_LINK = "This link is not valid. Ask the person who sent it for a new one.\n"
_ENDED = "This link has expired or was revoked. Ask the person who sent it for a new one.\n"


@dataclass(frozen=True)
class LinkCheck:
    """The check of a request's link: signed, not expired, and known to the ledger."""

    signer: Signer
    links: LinkBook

    async def admit(self, request: Request, path: str) -> Link:
        """Return the link of a request.

        Raises HTTPException 403 or 410, or StoreUnavailable (503) if the ledger is unreachable.
        """
        if not self.signer.is_signed(path, request.query_params):
            raise HTTPException(403, _NO_LINK)
        request.scope[KEEP]()
        if int(request.query_params["until"]) <= time.time():
            raise HTTPException(410, _ENDED)
        link = await asyncio.to_thread(self.links.find, request.path_params["id"])
        if link is None or link.path != path:
            raise HTTPException(410, _ENDED)
        return link


@dataclass(frozen=True)
class ObjectEndpoint:
    """GET and HEAD of objects."""

    check: LinkCheck
    stores: Mapping[str, Store]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        params = request.path_params
        path = object_path(params["id"], params["store"], params["key"])
        link = await self.check.admit(request, path)
        if link.verb != GET or link.store not in self.stores:
            raise HTTPException(410, _ENDED)
        served = await asyncio.to_thread(ServedObject.open, self.stores[link.store], link.key)
        await served.serve(scope, receive, send)


def make_app(
    check: LinkCheck,
    stores: Mapping[str, Store],
    uploads: Uploads,
    prefix: str = "",
    more: Sequence[BaseRoute] = (),
) -> Starlette:
    """Return the service with *more* routes. It also answers below *prefix*, for a proxy that keeps the prefix."""
    routes: list[BaseRoute] = [
        Route("/health", _health, methods=["GET"]),
        Route("/get/{id}/{store}/{key:path}", ObjectEndpoint(check, stores), methods=["GET", "HEAD"]),
        Route("/put/{id}", UploadEndpoint(check, uploads, prefix), methods=METHODS),
        *more,
    ]
    if prefix:
        routes.append(Mount(prefix, routes=list(routes)))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        cleaner = asyncio.create_task(uploads.end_links_forever())
        yield
        cleaner.cancel()
        await uploads.close()

    handlers = {HTTPException: error_response, WorkerError: error_response}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False  # it would redirect to the host that the request names
    return app


@dataclass(frozen=True)
class UploadEndpoint:
    """The page, PUT and tus requests of uploads."""

    check: LinkCheck
    uploads: Uploads
    prefix: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        # tus 1.0: this header replaces the method, for clients that cannot send PATCH.
        method = request.headers.get("x-http-method-override", request.method).upper()
        more = {} if method in ("GET", "PUT") else TUS
        await respond_with(request, self._answer(request, method), more, send)

    async def _answer(self, request: Request, method: str) -> Response:
        if method == "OPTIONS":
            return self.uploads.options()
        path = upload_path(request.path_params["id"])
        link = await self.check.admit(request, path)
        if method not in METHODS:
            raise HTTPException(405, "This method is not allowed\n", {"Allow": ", ".join(METHODS)})
        return await self.uploads.answer(request, method, link, self.prefix + path)


async def _health(_: Request) -> Response:
    """Answer 200 while the process serves requests. ``ssvm doctor`` checks its dependencies."""
    return PlainTextResponse("ok\n")


async def respond_with(request: Request, answer: Awaitable[Response], headers: Mapping[str, str], send: Send) -> None:
    """Send the response that *answer* returns, or that for its error, with more headers."""
    try:
        response = await answer
    except (HTTPException, WorkerError) as error:
        response = await error_response(request, error)
    response.headers.update(headers)
    await respond(request, response, send)


async def error_response(request: Request, error: Exception) -> Response:
    """Return a page for a browser, and plain text for a program.

    For a failed request, a program gets the error object as the command line prints it with ``--json``. A link's
    holder may read it.
    """
    assert isinstance(error, HTTPException | WorkerError)
    if isinstance(error, WorkerError):
        _LOG.warning("%s %s: %s", request.method, request.scope["path"], error)
    if is_for_people(request):
        return error_page(error)
    return refusal(error) if isinstance(error, HTTPException) else failure(error)
