"""Exact reads from a stream of chunks, for formats that must be read piece by piece."""

from __future__ import annotations

from collections.abc import Iterable

from ssvm_worker.streaming.interfaces import CHUNK


class ExactReader:
    """Hands out the bytes of *chunks* in the pieces asked for; holds one chunk, and the piece."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._held = memoryview(b"")
        #: Bytes handed out, and not pushed back.
        self.position = 0

    def some(self, most: int = CHUNK) -> bytes:
        """At least one byte and *most* at the most, as they come; nothing at the end."""
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._held = memoryview(chunk)
        piece, self._held = self._held[:most], self._held[most:]
        self.position += len(piece)
        # A piece that is a whole chunk is that chunk: nothing is copied.
        return piece.obj if isinstance(piece.obj, bytes) and len(piece.obj) == len(piece) else bytes(piece)

    def exactly(self, size: int) -> bytes:
        """The next *size* bytes; EOFError if the stream ends before."""
        pieces = []
        while size and (piece := self.some(size)):
            pieces.append(piece)
            size -= len(piece)
        if size:
            raise EOFError(f"{size} bytes are missing at offset {self.position}")
        return b"".join(pieces)

    def push_back(self, data: bytes) -> None:
        """Hand *data* out again, next."""
        self._held = memoryview(data + bytes(self._held))
        self.position -= len(data)
