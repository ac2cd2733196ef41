"""A listening socket that bounds its open connections, so that silent clients cannot shut others out.

Any stranger can open connections and send nothing. Closing the newest ones would serve the stranger; closing the oldest
silent ones serves everybody who sends a request at once.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass
class ClientConnection:
    """One open connection."""

    connection: socket.socket
    #: Who shares a limit with it: an IPv4 address, or an IPv6 network of 64 bits; "" for a trusted proxy.
    peer: str
    #: Whether it carries a request that must not be interrupted for a newcomer.
    kept: bool = False
    #: Whether it was ended for a newcomer; its owner will close it.
    ended: bool = False


class Listener(socket.socket):
    """Accepts at most *most* connections, and *share* from one address.

    Above that ``accept`` closes the oldest connection that is not kept. If all are kept, it sends *busy* to the new one
    and closes it. *proxies* are networks whose connections have no share: a proxy connects for many clients.
    Not thread-safe, except for ``ClientConnection.kept``.
    """

    def __init__(
        self, listening: socket.socket, most: int, share: int, proxies: Sequence[Network] = (), busy: bytes = b""
    ) -> None:
        super().__init__(listening.family, listening.type, listening.proto, fileno=listening.detach())
        self.most, self._share, self._proxies, self._busy = most, share, proxies, busy
        #: By the number of the handle, the oldest first.
        self._places: dict[int, ClientConnection] = {}

    def accept(self) -> tuple[socket.socket, Any]:
        """As socket.accept; BlockingIOError if the new connection was refused, or another must close first."""
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._close_oldest(self._open()):
                raise BlockingIOError(errno.EAGAIN, "A connection closes to free its handle") from error
            raise
        peer = self._peer(str(address[0]))
        everybody = self._open()
        same = [each for each in everybody if each.peer == peer] if peer else []
        if not (self._has_room(same, self._share) and self._has_room(everybody, self.most)):
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(self._busy)
            connection.close()
            raise BlockingIOError(errno.EAGAIN, "All connections carry transfers")
        self._places.pop(connection.fileno(), None)  # the order is that of arrival
        self._places[connection.fileno()] = ClientConnection(connection, peer)
        return connection, address

    def place(self, handle: int) -> ClientConnection:
        """The open connection with that handle."""
        return self._places[handle]

    def _peer(self, host: str) -> str:
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        if any(address in each for each in self._proxies):
            return ""
        if address.version == 4:
            return str(address)
        return str(ipaddress.ip_network((address, 64), strict=False))

    def _open(self) -> list[ClientConnection]:
        for handle in [handle for handle, each in self._places.items() if each.connection.fileno() != handle]:
            del self._places[handle]
        return [each for each in self._places.values() if not each.ended]

    def _has_room(self, places: list[ClientConnection], most: int) -> bool:
        return len(places) < most or self._close_oldest(places)

    def _close_oldest(self, places: Iterable[ClientConnection]) -> bool:
        """Close the oldest that is not kept; False if there is none."""
        for each in places:
            if not each.kept:
                each.ended = True
                reset_at_close(each.connection)
                with contextlib.suppress(OSError):
                    each.connection.shutdown(socket.SHUT_RDWR)
                return True
        return False


def reset_at_close(connection: Any) -> None:
    """Let the kernel drop what the peer has not taken when the connection is closed, instead of keeping it."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class RateLimit(logging.Filter):
    """Lets *most* lines with the same text pass in *every_s* seconds, and then tells how many it left out."""

    def __init__(self, most: int = 5, every_s: float = 10.0) -> None:
        super().__init__()
        self._most, self._every_s = most, every_s
        #: When the period of a text began, and how many lines it had. Texts are those of the code, so there are few.
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line passes."""
        text, now = str(record.msg).partition("\n")[0], time.monotonic()
        since, count = self._seen.get(text, (now, 0))
        if now - since >= self._every_s:
            if count > self._most:
                record.msg = f"{record.msg} ({count - self._most} more such lines were left out)"
            since, count = now, 0
        self._seen[text] = since, count + 1
        return count < self._most
