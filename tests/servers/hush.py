"""A proxy that stops to forward data at a point of the conversation which the test chooses."""

from __future__ import annotations

import contextlib
import socket
import threading


class Hush:
    """Forwards connections until a certain turn of their conversation. Then it forwards nothing in either direction.

    A turn is everything that one side of a connection sends before the other side, or another connection, sends
    something. The connections stay open, so no client gets an error.
    """

    def __init__(self, turn: int | None = None, size: int = 0) -> None:
        """Stop *size* bytes after the start of that turn (from 0), or at its end if it is shorter. None: never."""
        self._turn, self._size = turn, size
        #: The number of turns so far.
        self.turns = 0
        #: Set when the proxy has held data back.
        self.silent = threading.Event()
        self._closing = threading.Event()
        self._speaker: object = None
        self._passed = 0
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []

    def before(self, port: int) -> int:
        """Listen on a port of loopback and forward to *port* there. Return the first port."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._open.append(listener)
        threading.Thread(target=self._accept, args=(listener, port), name="hush", daemon=True).start()
        return int(listener.getsockname()[1])

    def close(self) -> None:
        """End every connection."""
        self._closing.set()
        with self._lock:
            ended, self._open = self._open, []
        for each in ended:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listener: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", port))
                with self._lock:
                    self._open += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=ends, name="hush", daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(64 * 1024):
                target.sendall(piece[: self._may_pass(source, len(piece))])
                if self.silent.is_set():
                    self._closing.wait()
            if not self.silent.is_set():
                target.shutdown(socket.SHUT_WR)

    def _may_pass(self, speaker: object, size: int) -> int:
        """Return how many bytes of a piece the proxy may forward. Set ``silent`` at the first held byte."""
        with self._lock:
            if speaker is not self._speaker:
                self._speaker, self._passed = speaker, 0
                self.turns += 1
            if self._turn is None or (self.turns <= self._turn and not self.silent.is_set()):
                return size
            left = self._size - self._passed if self.turns - 1 == self._turn and not self.silent.is_set() else 0
            if left < size:
                self.silent.set()
            self._passed += size
            return max(0, min(left, size))
