"""A real FTP server, as far as a download needs one: USER, TYPE, SIZE, MDTM, REST, PASV, EPSV and RETR."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator

import pytest


class FtpServer:
    """Listens on a free port of loopback until ``close``."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.modified = "20200102030405"
        self.users = {"anonymous": ""}
        #: All lines that clients sent.
        self.asked: list[str] = []
        #: Commands that the server does not know.
        self.unknown: set[str] = set()
        #: After so many bytes of a transfer the connection breaks, so many times. It may still send 226.
        self.cut_after: int | None = None
        self.cut_times = 1_000_000
        self.lies = False
        #: Answers to commands that replace the real ones. The empty command is the connection itself.
        self.answers: dict[str, bytes] = {}
        #: The command whose answer has no end. ``left`` is set when the client disconnects.
        self.endless: str | None = None
        self.left = threading.Event()
        #: The data port in the answer, instead of the real one: for example the port of a proxy.
        self.reached_by: Callable[[int], int] = int
        #: The address in the answer to PASV, instead of the real one.
        self.passive_host = "127,0,0,1"
        self._server = _Listener(("127.0.0.1", 0), _Session)
        self._server.owner = self
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def serve(self, name: str, data: bytes) -> str:
        """Serve *data* at that path, and return the URL."""
        self.files[f"/{name}"] = data
        return self.url(name)

    def url(self, name: str) -> str:
        """Return the URL of a path. The path need not exist."""
        return f"ftp://127.0.0.1:{self.port}/{name}"

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    owner: FtpServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect. The tests cause this."""


class _Session(socketserver.StreamRequestHandler):
    server: _Listener

    def handle(self) -> None:
        self.owner, self.offset, self.user = self.server.owner, 0, ""
        self.listener: socket.socket | None = None
        self._greet()
        while line := self.rfile.readline().decode("latin-1").strip():
            self.owner.asked.append(line)
            command, _, argument = line.partition(" ")
            act = getattr(self, f"do_{command}", None) if command not in self.owner.unknown else None
            if self._says_instead(command):
                continue
            if act:
                act(argument)
            else:
                self._say("502 what?")

    def _greet(self) -> None:
        if not self._says_instead(""):
            self._say("220 hello")

    def _says_instead(self, command: str) -> bool:
        try:
            while self.owner.endless == command:
                self.wfile.write(b"220-and one more thing\r\n" * 100)
        except OSError:
            self.owner.left.set()
            raise
        self.wfile.write(self.owner.answers.get(command, b""))
        return command in self.owner.answers

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode("latin-1"))

    def do_USER(self, name: str) -> None:
        self.user = name
        self._say("331 and the password?")

    def do_PASS(self, password: str) -> None:
        known = self.owner.users.get(self.user)
        self._say("230 come in" if known == "" or known == password else "530 no")

    def do_TYPE(self, _: str) -> None:
        self._say("200 well")

    def do_SIZE(self, path: str) -> None:
        data = self.owner.files.get(path)
        self._say("550 nothing there" if data is None else f"213 {len(data)}")

    def do_MDTM(self, path: str) -> None:
        self._say(f"213 {self.owner.modified}" if path in self.owner.files else "550 nothing there")

    def do_REST(self, offset: str) -> None:
        self.offset = int(offset)
        self._say("350 from there")

    def do_PASV(self, _: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.owner.reached_by(self.listener.getsockname()[1])
        self._say(f"227 at ({self.owner.passive_host},{port // 256},{port % 256})")

    def do_RETR(self, path: str) -> None:
        owner = self.owner
        if path not in owner.files or self.listener is None:
            self._say("550 nothing there")
            return
        self._say("150 here it comes")
        body = owner.files[path][self.offset :]
        cut = owner.cut_after is not None and owner.cut_times > 0
        with contextlib.closing(self.listener), self.listener.accept()[0] as data, contextlib.suppress(OSError):
            data.sendall(body[: owner.cut_after] if cut else body)
        owner.cut_times -= cut
        self._say("426 broken off" if cut and not owner.lies else "226 that was it")

    def do_QUIT(self, _: str) -> None:
        self._say("221 bye")


@pytest.fixture
def ftp_server() -> Iterator[FtpServer]:
    """Return a server that accepts every user."""
    server = FtpServer()
    yield server
    server.close()
