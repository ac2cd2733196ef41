"""uvicorn's HTTP/1.1 protocol with limits for requests and for slow clients, and sendfile.

An attacker may send endless headers, hold a connection without a request, or keep sending after the response. This
module limits each of these in bytes and in time. net/listener.py limits the number of connections.

sendfile is the ASGI extension ``http.response.zerocopysend``. It runs in a thread, because a read from a hung NFS
server would otherwise block all other connections. The thread writes to a copy of the socket's descriptor. So it can
never write to another connection that got the same number.
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

from ssvm_worker.config.serve_section import ServeSection
from ssvm_worker.net.listener import Listener, reset_at_close
from ssvm_worker.units import KiB, MiB

EXTENSION = "http.response.zerocopysend"
#: Key in the scope of a request. Call its value when the request's signature is valid: then no new connection
#: interrupts the request.
KEEP = "ssvm.keep"
#: Limit for the parts of a request that are not its body: request line, headers, chunk extensions and trailers.
#: nginx allows 32 KiB of headers, Apache about 800 KiB. Known clients send less than 2 KiB.
_MAX_HEAD_BYTES = 64 * KiB
_MAX_HEADERS = 100
_MAX_URL_BYTES = 8 * KiB
#: Requests that a client may send before the first response.
_MAX_PIPELINE = 8
#: Seconds from the connection, or from the last response, until the headers of a request must be complete.
_HEAD_S = 10.0
#: Seconds and bytes that a refused client may still send. Closing at once could destroy the response.
_REFUSED_S, _REFUSED_BYTES = 2.0, 1 * MiB
#: Bytes in one sendfile call. The kernel returns far earlier, when the socket is full.
_BURST = 64 * MiB
#: Seconds between two checks of a slow reader.
_CHECK_S = 1.0


class ClientWatch:
    """Detects slow clients by the bytes that they have received so far."""

    def __init__(self, limits: ServeSection) -> None:
        self._limits = limits
        self._since, self._last_bytes = time.monotonic(), 0

    def is_slow(self, total_bytes: int) -> bool:
        """Return whether the client received too few bytes in the last stall_s seconds."""
        now = time.monotonic()
        if now - self._since < self._limits.stall_s:
            return False
        moved, self._last_bytes = total_bytes - self._last_bytes, total_bytes
        elapsed, self._since = now - self._since, now
        return moved < elapsed * self._limits.min_rate


class Protocol(HttpToolsProtocol):
    """One connection of a client."""

    def __init__(
        self,
        config: Config,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: Any = None,
        *,
        listener: Listener,
        limits: ServeSection,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._listener, self.limits = listener, limits
        self._deadline: asyncio.TimerHandle | None = None
        #: Bytes since the end of the headers or the last chunk of a body.
        self._head_bytes = 0
        self._in_head = False
        #: The status of the response to a malformed request.
        self._refusal_status = 400
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit for the first request."""
        super().connection_made(transport)
        self._client = self._listener.place(transport.get_extra_info("socket").fileno())
        self._reset_in(min(_HEAD_S, self.limits.stall_s))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limit."""
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the received bytes in pieces that end where a limit is reached."""
        offset = 0
        while offset < len(data) and not self._is_refused and not self.transport.is_closing():
            piece = data[offset : offset + _MAX_HEAD_BYTES - self._head_bytes]
            offset += len(piece)
            self._head_bytes += len(piece)
            super().data_received(piece)
            if self._head_bytes >= _MAX_HEAD_BYTES:
                self._refusal_status = 431
                self.send_400_response("The headers are too large.\n")
        self._head_bytes += len(data) - offset
        if self._head_bytes > _REFUSED_BYTES:
            reset(self.transport)

    def send_400_response(self, msg: str) -> None:
        """Refuse a malformed or too large request. Close after the client has had time to read the response."""
        if self._is_refused:
            return
        self._is_refused = True
        head = f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(msg)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[self._refusal_status] + head.encode() + msg.encode())
        self._reset_in(_REFUSED_S)

    def on_message_begin(self) -> None:
        """Record that headers follow."""
        super().on_message_begin()
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """Collect the URL; the parser refuses the request if this raises."""
        super().on_url(url)
        if len(self.url) > _MAX_URL_BYTES:
            self._refusal_status = 414
            raise ValueError("The URL is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header. Ignore trailers: they must not count as headers."""
        if not self._in_head:
            return
        if len(self.headers) >= _MAX_HEADERS:
            self._refusal_status = 431
            raise ValueError("There are too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Handle the request. Without TLS, offer sendfile."""
        self._in_head, self._head_bytes = False, 0
        if len(self.pipeline) >= _MAX_PIPELINE:
            raise ValueError("There are too many requests before the first response")
        self._stop_deadline()
        self.scope["extensions"] = {EXTENSION: {}} if self.scheme == "http" else {}

        def keep() -> None:
            self._client.kept = True

        self.scope[KEEP] = keep  # type: ignore[literal-required]
        previous = self.cycle
        super().on_headers_complete()
        if self.cycle is not previous:
            self.cycle.__class__ = _Cycle  # uvicorn creates the object and has no setting for its class
            self.cycle.limits = self.limits  # type: ignore[attr-defined]

    def on_body(self, body: bytes) -> None:
        """Pass on a chunk of the body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Wait for the next request. If the connection closes, the client must read the rest of the response."""
        self._client.kept = False
        super().on_response_complete()
        if self.transport.is_closing():
            self._reset_in(self.limits.stall_s)
        elif self.cycle.response_complete:
            self._reset_in(min(_HEAD_S, self.limits.stall_s))

    def _reset_in(self, seconds: float) -> None:
        self._stop_deadline()
        self._deadline = self.loop.call_later(seconds, reset, self.transport)

    def _stop_deadline(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None


class _Cycle(RequestResponseCycle):
    """One request and its response."""

    limits: ServeSection

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and self.more_body:
            self.keep_alive = False  # the rest of the request stays unread, so close the connection after the response
        if message["type"] != EXTENSION:
            try:
                await asyncio.wait_for(super().send(message), self.limits.stall_s)
            except TimeoutError:  # the client reads nothing
                reset(self.transport)
            return
        if self.disconnected:
            return
        assert not self.chunked_encoding
        count = int(message["count"])
        if self.scope["method"] != "HEAD":
            # The kernel must have all earlier bytes before sendfile writes to the same socket.
            self.transport.set_write_buffer_limits(0)
            while self.transport.get_write_buffer_size() and not self.disconnected:
                await asyncio.sleep(0.01)
            await self._send_file(int(message["file"]), int(message["offset"]), count)
        self.expected_content_length -= count
        await super().send({"type": "http.response.body", "body": b"", "more_body": bool(message.get("more_body"))})

    async def _send_file(self, file: int, offset: int, count: int) -> None:
        stop = threading.Event()
        copy = os.dup(self.transport.get_extra_info("socket").fileno())
        pump = _Pump(copy, file, stop, self.limits)
        work = asyncio.ensure_future(asyncio.to_thread(pump.send, offset, count))
        try:
            await asyncio.shield(work)
        except OSError as error:
            reset(self.transport)
            raise ConnectionError(f"connection reset: {error}") from error
        finally:
            stop.set()
            with contextlib.suppress(OSError):
                await work  # the thread uses the descriptors until its end
            os.close(copy)


def reset(transport: asyncio.Transport) -> None:
    """Reset the connection, so that the kernel drops the bytes that the client does not read."""
    reset_at_close(transport.get_extra_info("socket"))
    transport.abort()


@dataclass(frozen=True)
class _Pump:
    """Copies a range of a file to a socket. The caller closes both."""

    socket: int
    file: int
    stop: threading.Event
    limits: ServeSection

    def send(self, offset: int, count: int) -> None:
        """Send *count* bytes. Raise OSError if the client disconnected or is too slow, or if the file is too short."""
        poll, watch, sent = select.poll(), ClientWatch(self.limits), 0
        poll.register(self.socket, select.POLLOUT)
        while sent < count:
            try:
                written = os.sendfile(self.socket, self.file, offset + sent, min(_BURST, count - sent))
            except BlockingIOError:
                poll.poll(_CHECK_S * 1000)
                written = -1
            if not written:
                raise OSError("the file was truncated while it was sent")
            sent += max(written, 0)
            # Bytes in the socket's buffer that the client has not confirmed.
            (unconfirmed,) = struct.unpack("i", fcntl.ioctl(self.socket, termios.TIOCOUTQ, b"\0\0\0\0"))
            if self.stop.is_set() or watch.is_slow(sent - unconfirmed):
                raise OSError("the client reads too slowly")
