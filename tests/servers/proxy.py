"""A real HTTP proxy: absolute requests and CONNECT tunnels. It resolves every name to loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_PIECE = 64 * 1024


class ProxyServer:
    """Listens on a free port of loopback until ``close``."""

    def __init__(self) -> None:
        #: Method and target of each request.
        self.asked: list[str] = []
        self.authorizations: list[str] = []
        #: The status of the answer to a CONNECT.
        self.status = 200
        self._server = _Listener(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the proxy."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: ProxyServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self._note()
        parts = urlsplit(self.path)
        with socket.create_connection(("127.0.0.1", parts.port or 80)) as upstream:
            lines = [f"GET {parts.path} HTTP/1.1", *(f"{name}: {value}" for name, value in self.headers.items())]
            upstream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            _pump(upstream, self.connection)
        self.close_connection = True

    def do_CONNECT(self) -> None:
        self._note()
        self.close_connection = True
        self.send_response(self.server.owner.status)
        self.end_headers()
        if self.server.owner.status != 200:
            return
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as upstream:
            back = threading.Thread(target=_pump, args=(upstream, self.connection), daemon=True)
            back.start()
            _pump(self.connection, upstream)
            back.join()

    def _note(self) -> None:
        owner = self.server.owner
        owner.asked.append(f"{self.command} {self.path}")
        owner.authorizations += self.headers.get_all("Proxy-Authorization") or []


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
