"""A real HTTP(S) server that misbehaves on request, one path at a time.

server = HttpServer()
url = server.serve("image.raw", data, cut_after=1000, cut_times=1)
server.requests[0].headers["Range"]
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

from tests.waiting import PATIENCE_S

PIECE = 64 * 1024


@dataclass
class Behaviour:
    """How the server answers a GET of one path."""

    data: bytes = b""
    status: int = 200
    etag: str | None = '"v1"'
    last_modified: str | None = None
    #: Whether it supports ranges. Otherwise it does not mention them and sends the whole file.
    ranges: bool = True
    #: It sends Accept-Ranges, but always the whole file.
    ignore_range: bool = False
    #: The Content-Range instead of the right one.
    content_range: str | None = None
    #: The Content-Length instead of the right one. "" omits it, and the body ends with the connection.
    content_length: str | None = None
    chunked: bool = False
    #: After so many bytes of the body the connection is closed, so many times.
    cut_after: int | None = None
    cut_times: int = 1_000_000
    #: Whether a cut is a TCP reset.
    reset: bool = False
    #: Over TLS: send close_notify before the close, as the standard requires.
    good_bye: bool = False
    #: After so many bytes of the body the server is silent until it stops.
    stall_after: int | None = None
    #: After so many bytes of the whole body, send nothing until a client requests a range with an end.
    hold_after: int | None = None
    #: Send single bytes, twenty in a second.
    drip: bool = False
    #: Bytes in a second.
    rate: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    #: The behaviour of the second request and of later ones.
    then: Behaviour | None = None
    #: The behaviour of every request for a range.
    only_ranges: Behaviour | None = None
    #: The behaviours of the first requests for a range with an end. Parallel connections send such requests.
    ranged: list[Behaviour] = field(default_factory=list)


@dataclass
class PutBehaviour:
    """How the server answers a PUT to one path."""

    status: int = 200
    body: bytes = b""
    #: It answers after so many bytes, and closes the connection.
    early_after: int | None = None
    #: It stops reading after so many bytes.
    stall_after: int | None = None
    #: It closes the connection without an answer after the whole body.
    silent: bool = False


@dataclass(frozen=True)
class Request:
    """One received request."""

    method: str
    path: str
    headers: Message
    #: The client's port of the connection.
    port: int


class HttpServer:
    """Listens on a free port of loopback until ``close``."""

    def __init__(self, *, tls: bool = False, certified_for: str = "127.0.0.1", expires: datetime | None = None) -> None:
        self.requests: list[Request] = []
        #: Sent bytes of bodies, for each path.
        self.sent: Counter[str] = Counter()
        #: Complete bodies of PUT, for each path, and incomplete ones.
        self.stored: dict[str, bytes] = {}
        self.broken: dict[str, bytes] = {}
        self.paths: dict[str, Behaviour] = {}
        self.puts: dict[str, PutBehaviour] = {}
        self.closing = threading.Event()
        #: Set when a path begins to stall, or when a PUT breaks.
        self.stalled = threading.Event()
        self.put_broken = threading.Event()
        #: Set after a request for a range with an end.
        self.ranged = threading.Event()
        self._authority = trustme.CA() if tls else None
        self.context = self._tls(certified_for, expires)
        self._server = _Listener(self)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def _tls(self, certified_for: str, expires: datetime | None) -> ssl.SSLContext | None:
        if self._authority is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(certified_for, not_after=expires).configure_cert(context)
        return context

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """Return the URL of a path. The path need not exist."""
        return f"{'https' if self.context else 'http'}://{host}:{self.port}/{path.lstrip('/')}"

    def serve(self, name: str, data: bytes, **behaviour: object) -> str:
        """Serve *data* at that path, with the fields of Behaviour. Return the URL."""
        self.paths[f"/{name}"] = Behaviour(data, **behaviour)  # type: ignore[arg-type]
        return self.url(name)

    def redirect(self, name: str, location: str, status: int = 302) -> str:
        """Redirect from that path, and return its URL."""
        return self.serve(name, b"elsewhere", status=status, headers={"Location": location})

    def take(self, name: str, **behaviour: object) -> str:
        """Accept a PUT at that path, with the fields of PutBehaviour. Return the URL."""
        self.puts[f"/{name}"] = PutBehaviour(**behaviour)  # type: ignore[arg-type]
        return self.url(name)

    def ca_file(self, directory: Path) -> str:
        """Return the PEM file with the authority's certificate."""
        assert self._authority
        path = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(str(path))
        return str(path)

    def close(self) -> None:
        """Stop the server, and end every stalled connection."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, owner: HttpServer) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect. The tests cause this."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def setup(self) -> None:
        self.owner = self.server.owner
        if self.owner.context:
            self.request = self.owner.context.wrap_socket(self.request, server_side=True)
        super().setup()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self._note()
        path = self.path.partition("?")[0]
        behaviour = self.owner.paths.get(path, Behaviour(b"nothing here", status=404))
        bounded = re.fullmatch(r"bytes=\d+-\d+", self.headers.get("Range", ""))
        if behaviour.then:
            self.owner.paths[path] = behaviour.then
        if bounded:
            self.owner.ranged.set()
        if behaviour.only_ranges and "Range" in self.headers:
            behaviour = behaviour.only_ranges
        if bounded and behaviour.ranged:
            behaviour = behaviour.ranged.pop(0)
        self.close_connection = not bounded
        _Answer(self, behaviour).send()

    def do_PUT(self) -> None:
        self._note()
        self.close_connection = True
        path = self.path.partition("?")[0]
        behaviour = self.owner.puts.get(path, PutBehaviour(404))
        length, body = int(self.headers["Content-Length"]), bytearray()
        most = min(
            length, *(each for each in (behaviour.early_after, behaviour.stall_after) if each is not None), length
        )
        try:
            while len(body) < most and (piece := self.rfile.read1(min(PIECE, most - len(body)))):  # type: ignore[attr-defined]
                body += piece
        except OSError:
            pass
        if behaviour.stall_after is not None:
            self.owner.stalled.set()
            self.owner.closing.wait()
        elif len(body) < most:
            self.owner.broken[path] = bytes(body)
            self.owner.put_broken.set()
        elif not behaviour.silent:
            if behaviour.status < 300:
                self.owner.stored[path] = bytes(body)
            self._reply(behaviour)
            self._linger()

    def _linger(self) -> None:
        """Read the rest of the body, as real servers do. A close with unread bytes would reset the connection."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(PATIENCE_S)
            while self.rfile.read1(PIECE):  # type: ignore[attr-defined]
                pass

    def _reply(self, behaviour: PutBehaviour) -> None:
        self.send_response(behaviour.status)
        self.send_header("Content-Length", str(len(behaviour.body)))
        self.end_headers()
        self.wfile.write(behaviour.body)

    def _note(self) -> None:
        self.owner.requests.append(Request(self.command, self.path, self.headers, self.client_address[1]))


class _Answer:
    """Answer one GET."""

    def __init__(self, handler: _Handler, behaviour: Behaviour) -> None:
        self.handler, self.behaviour, self.owner = handler, behaviour, handler.owner
        self.body, self.status, self.range = behaviour.data, behaviour.status, ""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        same = handler.headers.get("If-Range") in (None, behaviour.etag, behaviour.last_modified)
        if wanted and same and behaviour.ranges and not behaviour.ignore_range and behaviour.status == 200:
            self._narrow(int(wanted[1]), int(wanted[2] or len(self.body) - 1))

    def _narrow(self, start: int, last: int) -> None:
        total = len(self.body)
        self.status = 206 if start < total else 416
        self.range = self.behaviour.content_range or f"bytes {start}-{last}/{total}"
        self.body = self.body[start : last + 1]

    def send(self) -> None:
        handler = self.handler
        handler.send_response(self.status)
        for name, value in self._headers().items():
            handler.send_header(name, value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            self._send_body()

    def _headers(self) -> dict[str, str]:
        behaviour, headers = self.behaviour, dict[str, str]()
        if behaviour.etag:
            headers["ETag"] = behaviour.etag
        if behaviour.last_modified:
            headers["Last-Modified"] = behaviour.last_modified
        if behaviour.ranges:
            headers["Accept-Ranges"] = "bytes"
        if self.range:
            headers["Content-Range"] = self.range
        if behaviour.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif behaviour.content_length != "":
            headers["Content-Length"] = behaviour.content_length or str(len(self.body))
        return {**headers, **behaviour.headers}

    def _send_body(self) -> None:
        behaviour, body = self.behaviour, self.body
        cut = behaviour.cut_after is not None and behaviour.cut_times > 0
        if cut:
            behaviour.cut_times -= 1
            body = body[: behaviour.cut_after]
        elif behaviour.stall_after is not None:
            body = body[: behaviour.stall_after]
        step = 1 if behaviour.drip else PIECE
        for start in range(0, len(body), step):
            if behaviour.hold_after is not None and not self.range and start >= behaviour.hold_after:
                while not (self.owner.ranged.is_set() or self.owner.closing.is_set()):
                    self.owner.ranged.wait(0.05)
            self._write(body[start : start + step])
        if cut:
            self._cut()
        elif behaviour.stall_after is not None:
            self.owner.stalled.set()
            self.owner.closing.wait()
        elif behaviour.chunked:
            self.handler.wfile.write(b"0\r\n\r\n")
        elif behaviour.good_bye:
            self.handler.request.unwrap()

    def _write(self, piece: bytes) -> None:
        write: Callable[[bytes], object] = self.handler.wfile.write
        write(b"%x\r\n%s\r\n" % (len(piece), piece) if self.behaviour.chunked else piece)
        self.owner.sent[self.handler.path.partition("?")[0]] += len(piece)
        if self.behaviour.drip:
            self.owner.closing.wait(0.05)
        elif self.behaviour.rate:
            self.owner.closing.wait(len(piece) / self.behaviour.rate)

    def _cut(self) -> None:
        if self.behaviour.reset:
            self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.handler.wfile.flush()
        # shutdown_request of socketserver would end the connection regularly first.
        self.handler.request.close() if self.behaviour.reset else self.handler.request.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def http_server() -> Iterator[HttpServer]:
    """Return a server without TLS."""
    server = HttpServer()
    yield server
    server.close()


@pytest.fixture
def https_server() -> Iterator[HttpServer]:
    """Return a server whose private authority is in ``ca_file``."""
    server = HttpServer(tls=True)
    yield server
    server.close()
