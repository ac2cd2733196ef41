"""Limit the open connections of a listening socket, so that silent clients cannot block others.

An attacker can open connections and send nothing. If the server refused new connections, the attacker would win. So it
closes the oldest silent connections: clients that send a request at once are served.
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
    #: The key of its limit: an IPv4 address, or an IPv6 network of 64 bits. "" for a trusted proxy, which has no limit.
    peer: str
    #: Whether it carries a request that a new connection must not interrupt.
    kept: bool = False
    #: Whether it was shut down in favour of a new connection. Its owner closes it.
    ended: bool = False


class Listener(socket.socket):
    """Listening socket with at most *max_connections* connections, and *max_per_address* of them from one address.

    Above these limits ``accept`` closes the oldest connection that is not kept. If all are kept, it sends *busy* to the
    new connection and closes it. *proxies* are networks without the limit per address: a proxy connects for many
    clients. Not thread-safe, except for ``ClientConnection.kept``.
    """

    def __init__(
        self,
        listening: socket.socket,
        max_connections: int,
        max_per_address: int,
        proxies: Sequence[Network] = (),
        busy: bytes = b"",
    ) -> None:
        super().__init__(listening.family, listening.type, listening.proto, fileno=listening.detach())
        self.max_connections, self._max_per_address = max_connections, max_per_address
        self._proxies, self._busy = proxies, busy
        #: By file descriptor, the oldest first.
        self._connections: dict[int, ClientConnection] = {}

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection like socket.accept.

        Raises BlockingIOError if it refused the new connection, or if another connection must close first.
        """
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._close_oldest(self._open()):
                raise BlockingIOError(errno.EAGAIN, "Another connection closes to free its descriptor") from error
            raise
        peer = self._peer(str(address[0]))
        every = self._open()
        same = [each for each in every if each.peer == peer] if peer else []
        limits = ((same, self._max_per_address), (every, self.max_connections))
        if not all(len(each) < maximum or self._close_oldest(each) for each, maximum in limits):
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(self._busy)
            connection.close()
            raise BlockingIOError(errno.EAGAIN, "All connections carry transfers")
        self._connections.pop(connection.fileno(), None)  # so that the dict keeps the order of arrival
        self._connections[connection.fileno()] = ClientConnection(connection, peer)
        return connection, address

    def place(self, handle: int) -> ClientConnection:
        """Return the open connection with this file descriptor."""
        return self._connections[handle]

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
        for handle in [handle for handle, each in self._connections.items() if each.connection.fileno() != handle]:
            del self._connections[handle]
        return [each for each in self._connections.values() if not each.ended]

    def _close_oldest(self, connections: Iterable[ClientConnection]) -> bool:
        """Shut down the oldest connection that is not kept. Return False if there is none."""
        for each in connections:
            if not each.kept:
                each.ended = True
                reset_at_close(each.connection)
                with contextlib.suppress(OSError):
                    each.connection.shutdown(socket.SHUT_RDWR)
                return True
        return False


def reset_at_close(connection: Any) -> None:
    """Make the kernel discard unsent data when the connection is closed, instead of keeping it for the peer."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class RateLimit(logging.Filter):
    """Log filter that passes at most *max_lines* with the same text in *every_s* seconds.

    The first line of the next period reports how many lines were suppressed.
    """

    def __init__(self, max_lines: int = 5, every_s: float = 10.0) -> None:
        super().__init__()
        self._max_lines, self._every_s = max_lines, every_s
        #: By text: the start of the period, and the number of lines in it. Texts are constants of the code, so few.
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line passes."""
        text, now = str(record.msg).partition("\n")[0], time.monotonic()
        since, count = self._seen.get(text, (now, 0))
        if now - since >= self._every_s:
            if count > self._max_lines:
                record.msg = f"{record.msg} ({count - self._max_lines} more such lines were left out)"
            since, count = now, 0
        self._seen[text] = since, count + 1
        return count < self._max_lines
