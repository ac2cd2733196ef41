"""The routes that a management server and its users expect of a system VM.

GET  /userdata/DIRECTORY/NAME          a link of CreateEntityDownloadURLCommand
POST /upload/UUID  /upload?uuid=UUID   a browser upload. The second form is that of Apache in a system VM
GET  /copy/SecStorage/DIRECTORY/KEY    a copy by another zone: with a login, and from known addresses only
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.jobs.download.request import Request as DownloadRequest
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.ledger.cloudstack_web import USERDATA, CloudStackWeb, check_path
from ssvm_worker.ledger.links import PUT, Link, server_link
from ssvm_worker.ledger.links.redis import LinkBook
from ssvm_worker.serve.app import respond_with
from ssvm_worker.serve.incoming import Uploads
from ssvm_worker.serve.outgoing import ServedObject
from ssvm_worker.serve.uvicorn_protocol import KEEP
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import KiB

from .form import FileForm, boundary_of
from .ticket import read_ticket

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_LOG = logging.getLogger("ssvm.serve")
_NOT_FOUND = "This link does not exist, has expired, or was revoked\n"
#: A page of the management server's web interface sends the file. So any origin may. A browser refuses two of these
#: headers, even with the same value.
_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST, OPTIONS",
    "Access-Control-Allow-Headers": "x-requested-with, Content-Type, origin, authorization, accept, "
    "client-security-token, x-signature, x-metadata, x-expires",
    "Access-Control-Max-Age": "600",
}
#: The most bytes of a form besides its file.
_FORM_BYTES = 64 * KiB


@dataclass(frozen=True)
class UserdataEndpoint:
    """GET and HEAD of the links that the management server made."""

    web: CloudStackWeb
    stores: Mapping[str, Store]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = str(scope["path_params"]["path"])
        served = await asyncio.to_thread(self._open, path)
        scope[KEEP]()
        await served.serve(scope, receive, send)

    def _open(self, path: str) -> ServedObject:
        """Open the object of a link. Neither a log line nor an answer contains the path, which is a secret."""
        place = "an unknown object"
        try:
            link = self.web.find(check_path(path))
            if link is None:
                raise HTTPException(404, _NOT_FOUND)
            place = f"{link.store}:{link.key}"
            return _open(self.stores, link.store, link.key, path.rpartition("/")[2])
        except InvalidRequest as error:
            raise HTTPException(404, _NOT_FOUND) from error
        except WorkerError as error:
            _LOG.warning("cannot serve the download link of %s: %s", place, error)
            status = 503 if error.retryable else 404
            headers = {"Retry-After": "5"} if error.retryable else None
            raise HTTPException(status, "The file cannot be read now\n", headers) from error


@dataclass(frozen=True)
class CopyNetworks:
    """The addresses of clients that may copy."""

    #: Networks that may copy, besides the addresses that the management server sends.
    allowed: Sequence[IpNetwork]
    #: Reverse proxies, which report the address of the client.
    proxies: Sequence[IpNetwork]

    def allow(self, client: IpAddress) -> bool:
        """Return whether a network contains the client."""
        return any(client in each for each in self.allowed)

    def client_of(self, request: Request) -> IpAddress | None:
        """Return the address of the client, or None if a proxy reports none."""
        found = _address(request.client.host if request.client else "")
        if found and any(found in each for each in self.proxies):
            return _address(request.headers.get("x-forwarded-for", "").rpartition(",")[2])
        return found


@dataclass(frozen=True)
class CopyEndpoint:
    """GET and HEAD of objects by the secondary storage of another zone."""

    web: CloudStackWeb
    stores: Mapping[str, Store]
    networks: CopyNetworks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        await asyncio.to_thread(self._admit, request)
        scope[KEEP]()
        directory, key = request.path_params["directory"], request.path_params["key"]
        store = await asyncio.to_thread(self.web.store_of_directory, directory)
        try:
            check_key(key)
        except InvalidRequest as error:
            raise HTTPException(404, "There is no such object\n") from error
        served = await asyncio.to_thread(_open, self.stores, store, key, key.rpartition("/")[2])
        await served.serve(scope, receive, send)

    def _admit(self, request: Request) -> None:
        """Raise HTTPException 401 without the right login, and 403 for an unknown address."""
        login = self.web.copy_login()
        given = _basic(request.headers.get("authorization", ""))
        expected = f"{login.user}:{login.password}".encode() if login else b""
        if not login or not hmac.compare_digest(given, expected):
            raise HTTPException(401, "A login is required\n", {"WWW-Authenticate": 'Basic realm="copy"'})
        client = self.networks.client_of(request)
        if not client or not (str(client) in self.web.copy_addresses() or self.networks.allow(client)):
            _LOG.warning("refused a copy to %s: the management server has not allowed this address", client)
            raise HTTPException(403, f"The management server has not allowed copies to {client}\n")


@dataclass(frozen=True)
class BrowserUploads:
    """POST of a form with one file, and the preflight request of the browser."""

    web: CloudStackWeb
    links: LinkBook
    uploads: Uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        # The Apache of a system VM, which sends the other form, adds its own headers.
        more = _CORS if "uuid" in request.path_params else {}
        await respond_with(request, self._answer(request), more, send)

    async def _answer(self, request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(status_code=204)
        if request.method != "POST":
            raise HTTPException(405, "Send the file with POST\n", {"Allow": "POST, OPTIONS"})
        uuid = request.path_params.get("uuid") or request.query_params.get("uuid", "")
        form = FileForm(boundary_of(request.headers.get("content-type", "")))
        try:
            link, max_bytes = await asyncio.to_thread(self._admit, request, uuid)
        except InvalidRequest as error:
            _LOG.warning("refused the upload %s: %s", ascii(uuid[:64]), error)
            raise HTTPException(400, f"{error}\n") from error
        request.scope[KEEP]()
        length = int(request.headers.get("content-length") or 0)
        if max_bytes and length > max_bytes + _FORM_BYTES:
            raise HTTPException(413, f"The file has {length} bytes; the limit is {max_bytes}\n")
        if not await asyncio.to_thread(self.web.begin_upload, uuid, length):
            raise HTTPException(410, "The management server has cancelled this upload\n")
        await asyncio.to_thread(self.links.add, link)
        response = await self.uploads.put(request, link, form.file)
        return PlainTextResponse("upload successful.") if response.status_code == 201 else response

    def _admit(self, request: Request, uuid: str) -> tuple[Link, int | None]:
        """Return the link of a valid request, and its limit in bytes. Raise InvalidRequest for any other request."""
        key = self.web.upload_key()
        if not key:
            raise HTTPException(503, "The management server has not sent the key of uploads yet\n")
        now = time.time()
        ticket = read_ticket(key, uuid, request.headers, _signed_urls(request, uuid), now)
        store = self.web.store_of_url(ticket.store_url)
        if not store:
            raise InvalidRequest("This image store is unknown", ticket.store_url, "Wait until the agent has mounted it")
        download = parse_request(DownloadRequest, ticket.request(store), "download")
        values = download.model_dump(mode="json", exclude_defaults=True)
        link = Link(server_link(ticket.uuid), PUT, ticket.until, store, ticket.prefix, values, int(now), "CloudStack")
        return link, ticket.max_bytes


def cloudstack_routes(
    web: CloudStackWeb, links: LinkBook, stores: Mapping[str, Store], uploads: Uploads, networks: CopyNetworks
) -> list[BaseRoute]:
    """Return the routes."""
    receive = BrowserUploads(web, links, uploads)
    read = ("GET", "HEAD")
    return [
        Route(f"/{USERDATA}/{{path:path}}", UserdataEndpoint(web, stores), methods=read),
        Route("/copy/SecStorage/{directory}/{key:path}", CopyEndpoint(web, stores, networks), methods=read),
        Route("/upload/{uuid}", receive, methods=("GET", "POST", "OPTIONS")),
        Route("/upload", receive, methods=("GET", "POST", "OPTIONS")),
    ]


def _open(stores: Mapping[str, Store], store: str, key: str, name: str) -> ServedObject:
    """Open an object of a named store. Raise HTTPException 404 if there is no such store."""
    if store not in stores:
        raise HTTPException(404, "There is no such image store\n")
    return ServedObject.open_unlisted(stores[store], key, name)


def _signed_urls(request: Request, uuid: str) -> list[str]:
    """Return the URLs that the management server may have signed for this request.

    The server signs http or https by its own settings. A proxy reports the host that the client asked for in
    X-Forwarded-Host, of which there may be several. A client gains nothing by a false host, because the signature
    covers it.
    """
    given = f"{request.headers.get('x-forwarded-host', '')},{request.headers.get('host', '')}"
    hosts = [each.strip() for each in given.split(",") if each.strip()][:8]
    hosts += [each.rpartition(":")[0] for each in hosts if each.rpartition(":")[2].isdecimal()]
    return [f"{scheme}://{host}/upload/{uuid}" for scheme in ("https", "http") for host in hosts]


def _address(text: str) -> IpAddress | None:
    """Return an address. Return IPv4 for an IPv4 client of an IPv6 socket, and None for another text."""
    try:
        found = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _basic(header: str) -> bytes:
    """Return user and password of an Authorization header, as ``user:password``."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(value.strip(), validate=True)
    except binascii.Error:
        return b""
