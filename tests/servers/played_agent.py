"""The agent's side of a recorded connection, for tests of the simulated management server."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections import defaultdict
from typing import Any

from ssvm_worker.demo.cloudstack.authority import IssuedCertificate
from ssvm_worker.demo.cloudstack.wire import FROM_SERVER, REQUEST, LinkClosed, WireFrame
from tests.neighbours import ROOT
from tests.waiting import PATIENCE_S

RECORDINGS = ROOT / "tests/data/cloudstack/conversations"


def recorded(name: str) -> list[tuple[str, WireFrame]]:
    """Return the frames of a conversation: the sender, and the frame."""
    lines = (RECORDINGS / name).read_text().splitlines()
    frames = []
    for line in map(json.loads, lines):
        data = bytes.fromhex(line["header"]) + line["content"].encode()
        frames.append((line["from"], WireFrame.decode(data)))
    return frames


class PlayedAgent:
    """A connection as an agent. It verifies no certificate, like a fresh Java agent."""

    def __init__(self, address: tuple[str, int], certificate: IssuedCertificate | None = None) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        if certificate:
            context.load_cert_chain(certificate.certificate, certificate.key)
        self._socket = socket.create_connection(address, timeout=PATIENCE_S)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)
        self._lock = threading.Lock()
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._socket.sendall(self._outgoing.read())
                self._incoming.write(self._socket.recv(1 << 16) or b"")
        self._socket.sendall(self._outgoing.read())

    def send(self, frame: WireFrame) -> None:
        """Send one frame in records of 16000 bytes of content."""
        data = frame.encode()
        with self._lock:
            for start in range(0, len(data), 16000):
                self._tls.write(data[start : start + 16000])
                record = self._outgoing.read()
                more = 0x10000 if start + 16000 < len(data) else 0
                self._socket.sendall(struct.pack(">I", len(record) | more) + record)

    def receive(self) -> WireFrame:
        """Return the next frame."""
        data, more = b"", True
        while more:
            (header,) = struct.unpack(">I", self._read(4))
            more = bool(header & 0x10000)
            self._incoming.write(self._read(header & 0xFFFF))
            try:
                while piece := self._tls.read(1 << 16):
                    data += piece
            except ssl.SSLWantReadError:
                pass
        return WireFrame.decode(data)

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise LinkClosed("the server closed the connection")
            data += piece
        return data

    def close(self) -> None:
        """Close the connection as a dying process does."""
        self._socket.close()

    def start_up(self, **changes: Any) -> None:
        """Send a StartupSecondaryStorageCommand."""
        fields = {"type": "SecondaryStorage", "dataCenter": "1", "pod": "1", "name": "s-1-VM", "version": "4.23.0.0"}
        fields |= {"guid": "s-1-VM-NfsSecondaryStorageResource", "iqn": "NoIqn"} | changes
        name = "com.cloud.agent.api.StartupSecondaryStorageCommand"
        self.send(WireFrame(0x05, 0, -1, -1, -1, ((name, fields),)))

    def ping(self, host_id: int, sequence: int = 1) -> None:
        """Send a ping."""
        fields = {"hostType": "Storage", "hostId": host_id}
        name = "com.cloud.agent.api.PingStorageCommand"
        self.send(WireFrame(0x03, sequence, -1, host_id, host_id, ((name, fields),)))

    def answer(self, request: WireFrame, name: str, fields: dict[str, Any], **header: int) -> None:
        """Answer a command."""
        values = {"flags": request.flags & 0x06, "mgmt_id": request.mgmt_id, "agent_id": request.agent_id} | header
        messages = ((name, fields),)
        self.send(
            WireFrame(values["flags"], request.sequence, values["mgmt_id"], values["agent_id"], request.via, messages)
        )


class RecordedAgent(PlayedAgent):
    """Answers each command with the next recorded answer to a command of that class (and of that template)."""

    def __init__(self, address: tuple[str, int], name: str) -> None:
        super().__init__(address)
        self.conversation = recorded(name)
        self.heard: list[WireFrame] = []
        self._answers: dict[tuple[str, Any], list[WireFrame]] = defaultdict(list)
        requests = {each.sequence: each for side, each in self.conversation if side == "server" and each.is_request}
        for side, frame in self.conversation:
            if side == "agent" and not frame.is_request:
                self._answers[_topic(requests[frame.sequence])].append(frame)

    def play(self) -> None:
        """Start as recorded, then answer until the server closes the connection or no recorded answer is left."""
        self.send(self.conversation[0][1])
        try:
            while True:
                frame = self.receive()
                self.heard.append(frame)
                if frame.flags & REQUEST:
                    self._reply(frame)
        except (LinkClosed, OSError):
            pass

    def _reply(self, request: WireFrame) -> None:
        known = self._answers[_topic(request)]
        answer = known.pop(0) if len(known) > 1 else known[0]
        assert not answer.flags & FROM_SERVER
        self.answer(request, *answer.messages[0])


def _topic(frame: WireFrame) -> tuple[str, Any]:
    data = frame.fields.get("data") or frame.fields.get("dataDiskTemplate") or {}
    inner = next(iter(data.values()), {}) if data else {}
    return frame.name, frame.fields.get("id") or inner.get("id")
