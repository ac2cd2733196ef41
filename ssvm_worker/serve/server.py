"""Runs the service until SIGTERM."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_network
from typing import Any, cast
from urllib.parse import urlsplit

import uvicorn

from ssvm_worker.config.schema import ServeSection, Settings
from ssvm_worker.errors import ConfigError, StoreUnavailable
from ssvm_worker.net.listener import Listener, RateLimit
from ssvm_worker.runner.reaper import Reaper
from ssvm_worker.wiring.assembly import Stores, link_signer, open_ledger, open_links

from .app import Gate, make_app
from .incoming import Uploads
from .upload_job import Inbox
from .uvicorn_protocol import ClientTimeouts, Protocol

_LOG = logging.getLogger("ssvm.serve")
#: Connections that wait in the kernel, and that asyncio accepts before it looks at the accepted ones. It bounds the
#: handles above max_connections, and the lines that asyncio 3.11 logs when there is no handle left.
_BACKLOG = 128
#: To a client for whom there is no connection left.
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def serve(settings: Settings, listen: str = "") -> None:
    """Answer on HOST:PORT until SIGTERM or SIGINT, which give transfers drain_s; ConfigError if that cannot be.

    What it logs once it answers: "listening on http://HOST:PORT".
    """
    listener = bound(settings.serve, listen)
    server = make_server(settings, listener)
    url = _url_of(listener, secure=server.config.is_ssl)
    _LOG.warning("listening on %s", url)
    try:
        open_links(settings).listens(url)
    except StoreUnavailable as error:
        _LOG.warning("links are refused until the broker is there: %s", error)
    for name in ("uvicorn.error", "asyncio", "ssvm.serve"):
        logging.getLogger(name).addFilter(RateLimit())  # what strangers do must not fill the disk
    _raise_handle_limit(listener.most)
    signal.signal(signal.SIGTERM, lambda *_: None)  # which uvicorn raises again when it has ended in good order
    reaper = Reaper(settings)  # an upload's claim must run out even where no worker is
    reaper.start()
    try:
        asyncio.run(answer(server, listener))
    finally:
        reaper.stop()


def _url_of(listener: socket.socket, *, secure: bool) -> str:
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.getfqdn()
    return f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _raise_handle_limit(connections: int) -> None:
    """Allow the handles that so many transfers open: a socket and its copy, a file, and one of the broker each."""
    wanted = 4 * connections + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in range(wanted):
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if hard in range(wanted):
        what = "%d connections may need %d open files, and %d are allowed. Raise LimitNOFILE, or lower %s"
        _LOG.warning(what, connections, wanted, hard, "serve.max_connections")


def make_server(settings: Settings, listener: Listener) -> uvicorn.Server:
    """The service by the settings; ConfigError without a key that signs links."""
    given = settings.serve
    gate = Gate(link_signer(settings), open_links(settings))
    patience = ClientTimeouts(given.stall_s, given.min_rate)
    uploads = Uploads(Inbox(settings, open_ledger(settings)), patience)
    prefix = urlsplit(given.url or "").path.rstrip("/")
    config = uvicorn.Config(
        make_app(gate, Stores(settings), uploads, prefix),
        http=cast(Any, partial(Protocol, listener=listener, patience=patience)),
        ws="none",
        loop="asyncio",  # the other one hides its sockets
        lifespan="on",
        log_config=None,
        access_log=False,  # its lines hold the links
        proxy_headers=False,
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],
        backlog=_BACKLOG,
        timeout_graceful_shutdown=round(given.drain_s),
        ssl_certfile=given.certificate_file,
        ssl_keyfile=given.private_key_file,
    )
    return uvicorn.Server(config)


async def answer(server: uvicorn.Server, listener: Listener) -> None:
    """Until it is told to exit."""
    # A transfer holds a thread, and another request needs one more.
    threads = 2 * listener.most
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "serve"))
    await server.serve(sockets=[listener])


def bound(given: ServeSection, listen: str = "") -> Listener:
    """A socket that listens there; ConfigError if none can."""
    listen = listen or given.listen
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError("This is no HOST:PORT", listen, "Give --listen 127.0.0.1:8480 or the like")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        plain = socket.create_server((host, int(port)), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"Nothing can listen there: {error.strerror or error}", listen, "Give another") from error
    busy = b"" if given.certificate_file else _BUSY
    proxies = [ip_network(each) for each in given.trusted_proxies]
    return Listener(plain, given.max_connections, given.max_per_address, proxies, busy)
