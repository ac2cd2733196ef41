"""Runs the service until SIGTERM."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import uvicorn

from ssvm_worker.assembly import Stores, link_signer, open_ledger, open_links
from ssvm_worker.errors import ConfigError, StoreUnavailable
from ssvm_worker.settings import Settings
from tasks.reaper import Reaper

from .app import Gate, make_app
from .incoming import Uploads
from .session import Inbox
from .wire import Patience, Protocol

_LOG = logging.getLogger("ssvm.serve")


def serve(settings: Settings, listen: str = "") -> None:
    """Answer on HOST:PORT until SIGTERM or SIGINT, which give transfers drain_s; ConfigError if that cannot be.

    What it logs once it answers: "listening on http://HOST:PORT".
    """
    server = make_server(settings)
    listener = bound(listen or settings.serve.listen)
    url = _url_of(listener, secure=server.config.is_ssl)
    _LOG.warning("listening on %s", url)
    try:
        open_links(settings).listens(url)
    except StoreUnavailable as error:
        _LOG.warning("links are refused until the broker is there: %s", error)
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


def make_server(settings: Settings) -> uvicorn.Server:
    """The service by the settings; ConfigError without a key that signs links."""
    given = settings.serve
    gate = Gate(link_signer(settings), open_links(settings))
    Protocol.patience = Patience(given.stall_s, given.min_rate)
    uploads = Uploads(Inbox(settings, open_ledger(settings)), Protocol.patience)
    config = uvicorn.Config(
        make_app(gate, Stores(settings), uploads),
        http=Protocol,
        ws="none",
        loop="asyncio",  # the other one hides its sockets
        lifespan="on",
        log_config=None,
        access_log=False,  # its lines hold the links
        proxy_headers=False,
        server_header=False,
        limit_concurrency=given.max_connections,
        timeout_graceful_shutdown=round(given.drain_s),
        ssl_certfile=given.certificate_file,
        ssl_keyfile=given.private_key_file,
    )
    return uvicorn.Server(config)


async def answer(server: uvicorn.Server, listener: socket.socket) -> None:
    """Until it is told to exit."""
    # A transfer holds a thread, and whoever asks meanwhile needs another.
    threads = 2 * (server.config.limit_concurrency or 1)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "serve"))
    await server.serve(sockets=[listener])


def bound(listen: str) -> socket.socket:
    """A socket that listens there; ConfigError if none can."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError("This is no HOST:PORT", listen, "Give --listen 127.0.0.1:8480 or the like")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(f"Nothing can listen there: {error.strerror or error}", listen, "Give another") from error
