"""The bytes between a management server and an agent: TLS records with headers, frames, and the JSON in them."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Flags of a frame's header.
REQUEST, STOP_ON_ERROR, IN_SEQUENCE, FROM_SERVER, COMPRESSED = 0x01, 0x02, 0x04, 0x20, 0x80
_HEADER = struct.Struct(">BBHqiqqq")
#: The header of a TLS record: its length, and a flag that says that more records of the frame follow.
_RECORD, _FOLLOWING = struct.Struct(">I"), 0x10000
#: A receiver of CloudStack refuses a longer record. A sender puts at most 16384 bytes of content into one.
_MAX_RECORD, _MAX_CONTENT = 18000, 16384
#: CloudStack compresses content of at least so many bytes.
_COMPRESS_FROM = 8192
#: Gson writes these characters as escapes.
_ESCAPES = {each: f"\\u{ord(each):04x}" for each in "=&<>'\u2028\u2029"}

#: A command, an answer, or a part of them: the name of its Java class, and its fields.
Message = tuple[str, dict[str, Any]]


class LinkClosed(Exception):
    """The other side has closed the connection, or sent bytes that are no frame."""


@dataclass(frozen=True)
class WireFrame:
    """One frame: a header of 40 bytes, and a JSON array of commands or answers."""

    flags: int
    sequence: int
    mgmt_id: int
    agent_id: int
    via: int
    messages: tuple[Message, ...]
    version: int = field(default=0)

    @property
    def name(self) -> str:
        """Return the class of the first message, without its package."""
        return self.messages[0][0].rpartition(".")[2]

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of the first message."""
        return self.messages[0][1]

    @property
    def is_request(self) -> bool:
        """Return whether the frame contains commands. The others contain answers."""
        return bool(self.flags & REQUEST)

    def encode(self) -> bytes:
        """Return the bytes of the frame."""
        content = to_json(self.messages).encode()
        flags, size = self.flags & ~COMPRESSED, len(content)
        if size >= _COMPRESS_FROM:
            flags, content = flags | COMPRESSED, gzip.compress(content)
        header = _HEADER.pack(self.version, 0, flags, self.sequence, size, self.mgmt_id, self.agent_id, self.via)
        return header + content

    @classmethod
    def decode(cls, data: bytes) -> WireFrame:
        """Parse the bytes of a frame. Raise LinkClosed if they contradict the format."""
        if len(data) < _HEADER.size:
            raise LinkClosed(f"a frame of {len(data)} bytes, but a header has {_HEADER.size}")
        version, zero, flags, sequence, size, mgmt_id, agent_id, via = _HEADER.unpack_from(data)
        content = data[_HEADER.size :]
        if flags & COMPRESSED:
            content = gzip.decompress(content)
        if len(content) != size or version or zero:
            raise LinkClosed(f"the header says version {version} and {size} bytes; the content has {len(content)}")
        if flags & COMPRESSED and size < _COMPRESS_FROM:
            raise LinkClosed(f"{size} bytes are compressed; CloudStack compresses from {_COMPRESS_FROM}")
        messages = tuple(next(iter(each.items())) for each in json.loads(content))
        return cls(flags, sequence, mgmt_id, agent_id, via, messages, version)


def to_json(messages: tuple[Message, ...]) -> str:
    """Return what Gson writes for *messages*: no nulls, and the escapes of its HTML mode."""
    text = json.dumps(
        [{name: _without_nulls(fields)} for name, fields in messages], ensure_ascii=False, separators=(",", ":")
    )
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


class ServerLink:
    """The server's end of one connection. ``send`` may be called by several threads, ``receive`` by one."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self._socket = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()

    def handshake(self, refuse: Callable[[dict[str, Any] | None], int]) -> None:
        """Do the TLS handshake. Its records have no headers.

        *refuse* gets the client's certificate and returns the number of a TLS alert, or 0. The client receives the
        alert instead of the end of the handshake, as Java's server sends it.
        """
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._socket.sendall(self._outgoing.read())
                # One record at a time, because a frame may follow the last one.
                header = self._read(5)
                self._incoming.write(header + self._read(int.from_bytes(header[3:5], "big")))
            except ssl.SSLError as error:
                self._socket.sendall(self._outgoing.read())
                raise LinkClosed(f"TLS: {error.reason or error}") from error
        if alert := refuse(self._tls.getpeercert()):
            self._socket.sendall(bytes((0x15, 3, 3, 0, 2, 2, alert)))
            raise LinkClosed(f"the client certificate was refused with alert {alert}")
        self._socket.sendall(self._outgoing.read())

    def send(self, frame: WireFrame) -> None:
        """Send one frame. Raise LinkClosed if the connection is closed."""
        data = frame.encode()
        with self._lock:
            for start in range(0, len(data), _MAX_CONTENT):
                self._tls.write(data[start : start + _MAX_CONTENT])
                record = self._outgoing.read()
                following = _FOLLOWING if start + _MAX_CONTENT < len(data) else 0
                try:
                    self._socket.sendall(_RECORD.pack(len(record) | following) + record)
                except OSError as error:
                    raise LinkClosed(f"sending failed: {error.strerror}") from error

    def receive(self) -> WireFrame:
        """Wait for a frame. Raise LinkClosed at the end of the connection."""
        data, following = b"", True
        while following:
            (header,) = _RECORD.unpack(self._read(_RECORD.size))
            length, following = header & 0xFFFF, bool(header & _FOLLOWING)
            if length > _MAX_RECORD or header & ~(0xFFFF | _FOLLOWING):
                raise LinkClosed(f"wrong packet size: header {header:#010x}")
            record = self._read(length)
            with self._lock:
                self._incoming.write(record)
                data += self._decrypt()
        return WireFrame.decode(data)

    def _decrypt(self) -> bytes:
        content = b""
        try:
            while piece := self._tls.read(_MAX_CONTENT):
                content += piece
        except ssl.SSLWantReadError:
            return content
        except ssl.SSLError as error:
            raise LinkClosed(f"TLS: {error.reason or error}") from error
        raise LinkClosed("the client ended TLS")

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                piece = self._socket.recv(length - len(data))
            except OSError as error:
                raise LinkClosed(f"receiving failed: {error.strerror}") from error
            if not piece:
                raise LinkClosed("the client closed the connection")
            data += piece
        return data

    def close(self) -> None:
        """Close the connection. A thread in ``receive`` ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
