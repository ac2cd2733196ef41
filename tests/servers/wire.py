"""A TCP proxy between a client and a server. It counts bytes, and can cut, slow, hold or reset connections."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_PIECE = 16 * 1024
_RESET = struct.pack("ii", 1, 0)


class Wire:
    """Listens on a free port of loopback, and forwards to the port *target* there, until ``close``."""

    def __init__(self, target: int, rate: int = 0) -> None:
        """*rate*: bytes a second in each direction of each connection, without a fault. 0: no limit."""
        self._target = target
        self._steady = rate
        #: Bytes from clients, and to clients.
        self.up = self.down = 0
        #: The present rate.
        self.rate = rate
        #: After so many bytes to clients, in all connections together, the bits are wrong. None: never.
        self.damaged_after: int | None = None
        self._cut = False
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="wire", daemon=True).start()

    def cut(self) -> None:
        """End every connection, and each new one at once, until ``heal``."""
        self._cut = True
        self.reset()

    def hold(self) -> None:
        """Forward nothing until ``heal``. No peer gets an error."""
        self._flows.clear()

    def reset(self) -> None:
        """Reset all present connections."""
        with self._lock:
            ended, self._open = self._open, set()
        for each in ended:
            _reset(each)

    def heal(self) -> None:
        """Forward everything again, as at first."""
        self._cut, self.rate = False, self._steady
        self._flows.set()

    def close(self) -> None:
        """Stop the proxy."""
        self.cut()
        self._flows.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                if self._cut:
                    _reset(client)
                    continue
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            _reset(client)
            return
        with self._lock:
            self._open |= {client, server}
        back = threading.Thread(target=self._pump, args=(server, client, False), daemon=True)
        back.start()
        self._pump(client, server, True)
        back.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _pump(self, source: socket.socket, target: socket.socket, is_up: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                self._flows.wait()
                if self.rate:
                    time.sleep(len(piece) / self.rate)
                if not is_up and self.damaged_after is not None and self.down >= self.damaged_after:
                    piece = bytes(255 - each for each in piece)
                self._count(len(piece), is_up)  # before sending: a peer that has the bytes finds them counted
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    def _count(self, size: int, is_up: bool) -> None:
        with self._lock:
            self.up, self.down = self.up + size * is_up, self.down + size * (not is_up)


def _reset(end: socket.socket) -> None:
    """Reset the connection. Threads that wait for the socket wake up."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.shutdown(socket.SHUT_RD)
    end.close()
