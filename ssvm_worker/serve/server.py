"""Runs the HTTP service until SIGTERM."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import signal
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_network
from typing import Any, cast
from urllib.parse import urlsplit

import uvicorn
from starlette.routing import BaseRoute

from ssvm_worker.config.schema import Settings
from ssvm_worker.config.serve_section import ServeSection
from ssvm_worker.errors import ConfigError, StoreUnavailable, extra_missing
from ssvm_worker.ledger.links.redis import LinkBook
from ssvm_worker.net.listener import Listener, RateLimit
from ssvm_worker.runner.reaper import Reaper
from ssvm_worker.wiring.assembly import Stores, link_signer, open_cloudstack_web, open_ledger, open_links
from ssvm_worker.wiring.server_names import KnownStores

from .api import api_routes
from .app import LinkCheck, make_app
from .incoming import Uploads
from .upload_job import Inbox
from .uvicorn_protocol import Protocol

_LOG = logging.getLogger("ssvm.serve")
#: Connections that wait in the kernel, and that asyncio accepts before it handles the accepted ones. This limits the
#: file descriptors above max_connections, and the lines that asyncio 3.11 logs when no descriptor is free.
_BACKLOG = 128
#: The response to a client above the limit of connections.
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def serve(settings: Settings, listen: str = "", *, api: bool = False) -> None:
    """Serve on HOST:PORT until SIGTERM or SIGINT. Then running transfers have drain_s seconds to end.

    Logs "listening on http://HOST:PORT" when the service accepts connections. Raises ConfigError if it cannot start.
    """
    if api:
        settings = settings.model_copy(update={"serve": settings.serve.model_copy(update={"api": True})})
    listener = open_listener(settings.serve, listen)
    server = make_server(settings, listener)
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.getfqdn()
    url = f"{'https' if server.config.is_ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    _LOG.warning("listening on %s", url)
    try:
        open_links(settings).listens(url)
    except StoreUnavailable as error:
        _LOG.warning("links are refused until the broker answers: %s", error)
    for name in ("uvicorn.error", "asyncio", "ssvm.serve"):
        logging.getLogger(name).addFilter(RateLimit())  # log lines caused by strangers must not fill the disk
    # Allow 4 file descriptors for each connection: a socket, its copy, a file, and a connection to the broker
    needed = 4 * listener.max_connections + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in range(needed):
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if hard in range(needed):
        text = "%d connections may need %d open files, but the limit is %d. Raise LimitNOFILE, or lower %s"
        _LOG.warning(text, listener.max_connections, needed, hard, "serve.max_connections")
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again after its shutdown
    reaper = Reaper(settings)  # claims of uploads must expire even if no worker runs
    reaper.start()
    try:
        asyncio.run(run_server(server, listener))
    finally:
        reaper.stop()


def make_server(settings: Settings, listener: Listener) -> uvicorn.Server:
    """Return the configured service; raise ConfigError if the settings have no key for signing links."""
    section = settings.serve
    check = LinkCheck(link_signer(settings), open_links(settings))
    uploads = Uploads(Inbox(settings, open_ledger(settings)), section)
    prefix = urlsplit(section.url or "").path.rstrip("/")
    more = _cloudstack_routes(settings, check.links, uploads) if section.cloudstack else []
    more += api_routes(settings, open_ledger(settings)) if section.api else []
    sent = _sent_certificate(settings) if section.certificate_from_cloudstack else None
    config = uvicorn.Config(
        make_app(check, Stores(settings), uploads, prefix, more),
        http=cast(Any, partial(Protocol, listener=listener, limits=section)),
        ws="none",
        loop="asyncio",  # uvloop hides its sockets
        lifespan="on",
        log_config=None,
        access_log=False,  # its lines would contain the links
        proxy_headers=False,
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff")],
        backlog=_BACKLOG,
        timeout_graceful_shutdown=round(section.drain_s),
        ssl_certfile=section.certificate_file,
        ssl_keyfile=section.private_key_file,
        ssl_context_factory=(lambda *_: sent) if sent else None,
    )
    return uvicorn.Server(config)


def _cloudstack_routes(settings: Settings, links: LinkBook, uploads: Uploads) -> list[BaseRoute]:
    """Return the routes for a CloudStack management server. Raise ConfigError if their libraries are missing."""
    try:
        from .cloudstack.routes import CopyNetworks, cloudstack_routes
    except ImportError as error:
        raise extra_missing(f"serve.cloudstack needs {error.name}", "serve.cloudstack", "cloudstack") from error
    given = (settings.serve.copy_networks, settings.serve.trusted_proxies)
    networks = CopyNetworks(*([ip_network(each) for each in texts] for texts in given))
    return cloudstack_routes(open_cloudstack_web(settings), links, KnownStores(settings), uploads, networks)


def _sent_certificate(settings: Settings) -> ssl.SSLContext:
    """Return the context with the certificate of the management server. Raise ConfigError for contradictions."""
    if not settings.serve.cloudstack or settings.serve.certificate_file:
        what = "certificate_from_cloudstack needs cloudstack = true, and no certificate_file"
        raise ConfigError(what, "serve.certificate_from_cloudstack", "Correct the section [serve]")
    from .cloudstack.certificate import SentCertificate

    sent = SentCertificate(open_cloudstack_web(settings))
    sent.follow()
    return sent.context


async def run_server(server: uvicorn.Server, listener: Listener) -> None:
    """Serve until the server is asked to exit."""
    # A transfer occupies one thread. Another request needs one more.
    threads = 2 * listener.max_connections
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "serve"))
    await server.serve(sockets=[listener])


def open_listener(section: ServeSection, listen: str = "") -> Listener:
    """Return a socket that listens on *listen* or on serve.listen; raise ConfigError if this is impossible."""
    listen = listen or section.listen
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError("Invalid HOST:PORT", listen, "Give an address such as --listen 127.0.0.1:8480")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        plain = socket.create_server((host, int(port)), family=family, backlog=_BACKLOG)
    except OSError as error:
        what = f"Cannot listen on this address: {error.strerror or error}"
        raise ConfigError(what, listen, "Choose another address") from error
    busy = b"" if section.certificate_file or section.certificate_from_cloudstack else _BUSY
    proxies = [ip_network(each) for each in section.trusted_proxies]
    return Listener(plain, section.max_connections, section.max_per_address, proxies, busy)
