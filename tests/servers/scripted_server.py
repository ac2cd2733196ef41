"""A management server that does only what a test says, over real TLS. It has one connection at a time."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.frame import FROM_SERVER, IN_SEQUENCE, REQUEST, STOP_ON_ERROR
from ssvm_worker.demo.cloudstack.authority import RootAuthority
from ssvm_worker.demo.cloudstack.releases import class_of
from ssvm_worker.demo.cloudstack.wire import ServerLink, WireFrame
from tests.waiting import PATIENCE_S

#: The headers of a real server.
MGMT_ID, HOST_ID, FIRST = 0x000002FC00000001, 7, 0x4201000000000001


class ScriptedServer:
    """Accepts one agent, and sends and receives frames as the test says."""

    def __init__(self, authority: RootAuthority) -> None:
        self.authority = authority
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE_S)
        self.host, self.port = self._listener.getsockname()
        self._next = FIRST
        self.link: ServerLink | None = None
        self.socket: socket.socket | None = None

    def accept(self, context: ssl.SSLContext | None = None) -> ServerLink:
        """Wait for a connection, and do its handshake."""
        self.socket, _ = self._listener.accept()
        self.socket.settimeout(PATIENCE_S)
        self.link = ServerLink(self.socket, context or self.authority.context(strict=False, allow_expired=True))
        self.link.handshake(lambda _: 0)
        return self.link

    def accept_plain(self) -> socket.socket:
        """Wait for a connection without TLS."""
        self.socket, _ = self._listener.accept()
        self.socket.settimeout(PATIENCE_S)
        return self.socket

    def welcome(self, **startup_answer: Any) -> WireFrame:
        """Accept an agent, answer its Startup, and make it Up. Return the Startup."""
        self.accept()
        startup = self.receive()
        assert startup.name == "StartupAnswer".replace("Answer", "SecondaryStorageCommand")
        self.answer(startup, "StartupAnswer", {"pingInterval": 60, "result": True} | startup_answer)
        ready = self.command("ReadyCommand", {"hostId": HOST_ID})
        assert (self.receive().name, ready > 0) == ("ReadyAnswer", True)
        return startup

    def command(self, name: str, fields: dict[str, Any], *, ordered: bool = True, full_name: str = "") -> int:
        """Send a command and return its sequence."""
        flags = REQUEST | STOP_ON_ERROR | FROM_SERVER | (IN_SEQUENCE if ordered else 0)
        sequence, self._next = self._next, self._next + 1
        messages = ((full_name or class_of(name), fields),)
        self.send(WireFrame(flags, sequence, MGMT_ID, HOST_ID, HOST_ID, messages))
        return sequence

    def ask(self, name: str, fields: dict[str, Any], *, ordered: bool = True) -> WireFrame:
        """Send a command, and return its answer."""
        sequence = self.command(name, fields, ordered=ordered)
        answer = self.receive()
        assert answer.sequence == sequence
        return answer

    def answer(self, request: WireFrame, name: str, fields: dict[str, Any]) -> None:
        """Answer a request of the agent."""
        flags = request.flags & (STOP_ON_ERROR | IN_SEQUENCE) | FROM_SERVER
        self.send(
            WireFrame(flags, request.sequence, MGMT_ID, request.agent_id, request.via, ((class_of(name), fields),))
        )

    def send(self, frame: WireFrame) -> None:
        """Send one frame."""
        assert self.link
        self.link.send(frame)

    def receive(self) -> WireFrame:
        """Return the next frame of the agent."""
        assert self.link
        return self.link.receive()

    def send_plain(self, content: bytes) -> None:
        """Encrypt these bytes and send them as one message."""
        assert self.link
        assert self.socket
        self.link._tls.write(content)
        record = self.link._outgoing.read()
        self.socket.sendall(len(record).to_bytes(4, "big") + record)

    def close(self) -> None:
        """Close the connection and the listener."""
        if self.link:
            self.link.close()
        self._listener.close()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> RootAuthority:
    """An authority that all tests share, because making a key takes long."""
    return RootAuthority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def scripted(authority: RootAuthority) -> Iterator[ScriptedServer]:
    """A scripted server that listens."""
    server = ScriptedServer(authority)
    yield server
    server.close()


def authority_in(directory: Path) -> RootAuthority:
    """Return another authority."""
    directory.mkdir()
    return RootAuthority(directory)
