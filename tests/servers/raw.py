"""A server that sends exactly the bytes of a test, for answers that no HTTP library makes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

#: A function of the connection and the bytes received on it: the head, and perhaps more.
Answer = Callable[[socket.socket, bytes], None]


class RawServer:
    """Listen on a free port of loopback until ``close``. *answer* each connection once in a thread, then close it."""

    def __init__(self, answer: Answer, *, tls: bool = False) -> None:
        self.heads: list[bytes] = []
        self.closing = threading.Event()
        self._answer = answer
        self._authority = trustme.CA() if tls else None
        self._context = self._tls()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/image"
        threading.Thread(target=self._accept, daemon=True).start()

    def _tls(self) -> ssl.SSLContext | None:
        if self._authority is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert("127.0.0.1").configure_cert(context)
        return context

    def ca_file(self, directory: Path) -> str:
        """Write the authority's certificate as PEM."""
        assert self._authority
        path = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(str(path))
        return str(path)

    def close(self) -> None:
        """Stop the server."""
        self.closing.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.closing(connection):
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            came = b""
            while b"\r\n\r\n" not in came:
                piece = connection.recv(65536)
                if not piece:
                    return
                came += piece
            self.heads.append(came)
            self._answer(connection, came)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # A close with unread bytes would reset the connection.
                pass


Serve = Callable[..., RawServer]


@pytest.fixture
def raw_server() -> Iterator[Serve]:
    """Return a function that starts raw servers. They are closed at the end."""
    started: list[RawServer] = []

    def serve(answer: Answer, **given: bool) -> RawServer:
        started.append(RawServer(answer, **given))
        return started[-1]

    yield serve
    for each in started:
        each.close()
