"""Read exact numbers of bytes from a stream of chunks."""

from __future__ import annotations

from collections.abc import Iterable

from ssvm_worker.streaming.interfaces import CHUNK


class ExactReader:
    """Reader of pieces of any size from *chunks*. Memory: one chunk and one piece."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._held = memoryview(b"")
        #: Bytes returned so far, without those pushed back.
        self.position = 0

    def some(self, max_bytes: int = CHUNK) -> bytes:
        """Return at least 1 and at most *max_bytes* bytes, or b"" at the end."""
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._held = memoryview(chunk)
        piece, self._held = self._held[:max_bytes], self._held[max_bytes:]
        self.position += len(piece)
        # A piece that is a complete chunk is returned as that chunk, without a copy.
        return piece.obj if isinstance(piece.obj, bytes) and len(piece.obj) == len(piece) else bytes(piece)

    def exactly(self, size: int) -> bytes:
        """Return the next *size* bytes. Raises EOFError if the stream ends before."""
        pieces = []
        while size and (piece := self.some(size)):
            pieces.append(piece)
            size -= len(piece)
        if size:
            raise EOFError(f"{size} bytes are missing at offset {self.position}")
        return b"".join(pieces)

    def push_back(self, data: bytes) -> None:
        """Return *data* again with the next reads."""
        self._held = memoryview(data + bytes(self._held))
        self.position -= len(data)
