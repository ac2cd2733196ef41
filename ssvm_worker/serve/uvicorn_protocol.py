"""uvicorn's HTTP/1.1 with what it lacks: limits of what a client sends, an end for slow clients, and sendfile.

A stranger may send headers without end, keep a connection without a request, or send on after the answer. Each has a
limit in bytes and in time here. listening.py limits the number of connections.

sendfile is ASGI's own extension ``http.response.zerocopysend``. It runs in a thread, because a read from an NFS
server that hangs would otherwise block all other connections. The thread writes to a copy of the socket's handle,
so that it can never write to another connection that got the same number.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import struct
import termios
import threading
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ssvm_worker.net.listener import Listener, reset_at_close
from ssvm_worker.units import KiB, MiB

EXTENSION = "http.response.zerocopysend"
#: In the scope of a request: call it once the request is known to be signed, so that no newcomer interrupts it.
KEEP = "ssvm.keep"
#: The most of one request that is not its body: request line and headers, chunk extensions, trailers. nginx and Apache
#: allow 32 KiB and about 800 KiB of headers; no client of ours sends 2 KiB.
_HEAD_BYTES = 64 * KiB
_HEAD_LINES = 100
_URL_BYTES = 8 * KiB
#: Requests that a client may send before the first is answered.
_PIPELINE = 8
#: Seconds from the connection, or from the last answer, until the headers of a request must be complete.
_HEAD_S = 10.0
#: Seconds and bytes for which a client that is refused may still send: closing at once could destroy the answer.
_REFUSED_S, _REFUSED_BYTES = 2.0, 1 * MiB
#: Bytes in one call. The kernel returns when the socket is full, which is far earlier.
_BURST = 64 * MiB
#: Seconds between two looks at a slow reader.
_LOOK_S = 1.0


@dataclass(frozen=True)
class ClientTimeouts:
    """When a peer is too slow: less than min_rate bytes a second over stall_s seconds."""

    stall_s: float = 60.0
    min_rate: int = 1024


class ClientWatch:
    """Tells that a peer is too slow, from the bytes that it has taken or given so far."""

    def __init__(self, patience: ClientTimeouts) -> None:
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

    def __init__(
        self,
        config: Config,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: Any = None,
        *,
        listener: Listener,
        patience: ClientTimeouts,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._listener, self.patience = listener, patience
        self._deadline: asyncio.TimerHandle | None = None
        #: Bytes since the parser last found the end of headers, or a piece of a body.
        self._aside = 0
        self._in_head = False
        #: The status of an answer that refuses what does not parse.
        self._refusal = 400
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A request must begin."""
        super().connection_made(transport)
        self._place = self._listener.place(transport.get_extra_info("socket").fileno())
        self._cut_off_in(min(_HEAD_S, self.patience.stall_s))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._cut_off_never()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, in pieces that end where a limit is reached."""
        at = 0
        while at < len(data) and not self._is_refused and not self.transport.is_closing():
            piece = data[at : at + _HEAD_BYTES - self._aside]
            at += len(piece)
            self._aside += len(piece)
            super().data_received(piece)
            if self._aside >= _HEAD_BYTES:
                self._refusal = 431
                self.send_400_response("The headers are too large.\n")
        self._aside += len(data) - at
        if self._aside > _REFUSED_BYTES:
            cut_off(self.transport)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed or is too large, and close once the client has had time to read that."""
        if self._is_refused:
            return
        self._is_refused = True
        head = f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(msg)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[self._refusal] + head.encode() + msg.encode())
        self._cut_off_in(_REFUSED_S)

    def on_message_begin(self) -> None:
        """Read the headers of a request."""
        super().on_message_begin()
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """Collect the URL; the parser refuses the request if this raises."""
        super().on_url(url)
        if len(self.url) > _URL_BYTES:
            self._refusal = 414
            raise ValueError("The URL is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header. A trailer says nothing that we use; it must not pass for a header."""
        if not self._in_head:
            return
        if len(self.headers) >= _HEAD_LINES:
            self._refusal = 431
            raise ValueError("There are too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Handle the request, with sendfile where nothing encrypts."""
        self._in_head, self._aside = False, 0
        if len(self.pipeline) >= _PIPELINE:
            raise ValueError("There are too many requests before the first answer")
        self._cut_off_never()
        self.scope["extensions"] = {EXTENSION: {}} if self.scheme == "http" else {}
        self.scope[KEEP] = self._keep  # type: ignore[literal-required]
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self.cycle.__class__ = _Cycle  # made by the library, which takes no class for it
            self.cycle.patience = self.patience  # type: ignore[attr-defined]

    def on_body(self, body: bytes) -> None:
        """Hand on a piece of the body."""
        self._aside = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Await the next request; if the connection closes, the client must take what is left of the answer."""
        self._place.kept = False
        super().on_response_complete()
        if self.transport.is_closing():
            self._cut_off_in(self.patience.stall_s)
        elif self.cycle.response_complete:
            self._cut_off_in(min(_HEAD_S, self.patience.stall_s))

    def _keep(self) -> None:
        self._place.kept = True

    def _cut_off_in(self, seconds: float) -> None:
        self._cut_off_never()
        self._deadline = self.loop.call_later(seconds, cut_off, self.transport)

    def _cut_off_never(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None


class _Cycle(RequestResponseCycle):
    """One request and its answer."""

    patience: ClientTimeouts

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and self.more_body:
            self.keep_alive = False  # nobody reads the rest of the request, so the connection ends with the answer
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
            await asyncio.wait_for(super().send(message), self.patience.stall_s)
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
        pump = _Pump(copy, file, stop, self.patience)
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
    """Reset the connection: the kernel would keep what a client does not read."""
    reset_at_close(transport.get_extra_info("socket"))
    transport.abort()


@dataclass(frozen=True)
class _Pump:
    """From a file to a socket; both are somebody else's to close."""

    socket: int
    file: int
    stop: threading.Event
    patience: ClientTimeouts

    def send(self, offset: int, count: int) -> None:
        """Send so many bytes; OSError when the peer has gone or is too slow, or the file has ended."""
        poll, watch, sent = select.poll(), ClientWatch(self.patience), 0
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
