"""uvicorn's HTTP/1.1 with three things that it lacks: sendfile, an end for slow readers, and one for slow requests.

sendfile comes as ASGI's own extension ``http.response.zerocopysend``. It runs in a thread, because a read from an NFS
server that hangs would otherwise hold up all other connections; what it writes to is a copy of the socket's handle,
so that a connection that is closed meanwhile cannot become somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ssvm_worker.units import MiB

EXTENSION = "http.response.zerocopysend"
#: Bytes in one call. The kernel returns when the socket is full, which is far earlier.
_BURST = 64 * MiB
#: Seconds between two looks at a slow reader.
_LOOK_S = 1.0


@dataclass(frozen=True)
class Patience:
    """When a peer is too slow: less than min_rate bytes a second over stall_s seconds."""

    stall_s: float = 60.0
    min_rate: int = 1024


class Watch:
    """Tells that a peer is too slow, from the bytes that it has taken or given so far."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._since, self._then = time.monotonic(), 0

    def is_slow(self, done: int) -> bool:
        """Whether the last stall_s seconds brought too little."""
        now = time.monotonic()
        if now - self._since < self._patience.stall_s:
            return False
        moved, self._then = done - self._then, done
        elapsed, self._since = now - self._since, now
        return moved < elapsed * self._patience.min_rate


class Protocol(HttpToolsProtocol):
    """One connection."""

    patience = Patience()

    def __init__(self, config: Config, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A request must begin."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._headers_came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request has begun: its headers must come."""
        super().on_message_begin()
        self._await_headers()

    def on_headers_complete(self) -> None:
        """They have come, and the request is handled, with sendfile where nothing encrypts."""
        self._headers_came()
        if self.scheme == "http":
            self.scope["extensions"] = {EXTENSION: {}}
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self.cycle.__class__ = _Cycle  # made by the library, which takes no class for it

    def _await_headers(self) -> None:
        self._headers_came()
        self._deadline = self.loop.call_later(self.patience.stall_s, cut_off, self.transport)

    def _headers_came(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None


class _Cycle(RequestResponseCycle):
    """One request and its answer."""

    async def send(self, message: Any) -> None:
        if message["type"] != EXTENSION:
            await self._write(message)
            return
        if self.disconnected:
            return
        assert not self.chunked_encoding
        count = int(message["count"])
        if self.scope["method"] != "HEAD":
            await self._emptied()
            await self._send_file(int(message["file"]), int(message["offset"]), count)
        self.expected_content_length -= count
        await super().send({"type": "http.response.body", "body": b"", "more_body": bool(message.get("more_body"))})

    async def _write(self, message: Any) -> None:
        """Not longer than a peer may take for nothing at all."""
        try:
            await asyncio.wait_for(super().send(message), Protocol.patience.stall_s)
        except TimeoutError:
            cut_off(self.transport)

    async def _emptied(self) -> None:
        """All that was written before is with the kernel: what follows goes by another way."""
        self.transport.set_write_buffer_limits(0)
        while self.transport.get_write_buffer_size() and not self.disconnected:
            await asyncio.sleep(0.01)

    async def _send_file(self, file: int, offset: int, count: int) -> None:
        stop = threading.Event()
        copy = os.dup(self.transport.get_extra_info("socket").fileno())
        pump = _Pump(copy, file, stop, Protocol.patience)
        work = asyncio.ensure_future(asyncio.to_thread(pump.send, offset, count))
        try:
            await asyncio.shield(work)
        except OSError as error:
            cut_off(self.transport)
            raise ConnectionError(f"cut off: {error}") from error
        finally:
            stop.set()
            with contextlib.suppress(OSError):
                await work  # the handles are in use until it has ended
            os.close(copy)


def cut_off(transport: asyncio.Transport) -> None:
    """Reset the connection: a peer that reads nothing would else keep what is under way in the kernel's memory."""
    with contextlib.suppress(OSError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


@dataclass(frozen=True)
class _Pump:
    """From a file to a socket; both are somebody else's to close."""

    socket: int
    file: int
    stop: threading.Event
    patience: Patience

    def send(self, offset: int, count: int) -> None:
        """Send so many bytes; OSError when the peer has gone or is too slow, or the file has ended."""
        poll, watch, sent = select.poll(), Watch(self.patience), 0
        poll.register(self.socket, select.POLLOUT)
        while sent < count:
            try:
                took = os.sendfile(self.socket, self.file, offset + sent, min(_BURST, count - sent))
            except BlockingIOError:
                poll.poll(_LOOK_S * 1000)
                took = -1
            if not took:
                raise OSError("the file is shorter than it was")
            sent += max(took, 0)
            if self.stop.is_set() or watch.is_slow(sent - _waiting(self.socket)):
                raise OSError("the peer takes nothing")


def _waiting(socket: int) -> int:
    """Bytes that the kernel has, and the peer has not confirmed."""
    return int(struct.unpack("i", fcntl.ioctl(socket, termios.TIOCOUTQ, b"\0\0\0\0"))[0])
