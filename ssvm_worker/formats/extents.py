"""Read the data of a disk as extents: (offset, bytes) in the order of the disk, without the holes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.streaming.isal_zlib import inflate
from ssvm_worker.streaming.pipeline import tap

from .detect import ASK_PUBLISHER, corrupt, cut_short
from .stream_optimized import StreamOptimized
from .vmdk import MARKER_EOS, SECTOR, parse_header

#: Offset on the disk, and the bytes there.
Extent = tuple[int, bytes]

_MARKER = struct.Struct("<QII")
#: Bytes of a grain's marker. The data of the grain follows.
_GRAIN_HEAD = 12
_HOLE = bytes(CHUNK)


def vmdk_extents(chunks: Iterable[bytes], where: str, capacity: int) -> Iterator[Extent]:
    """Yield the grains of a streamOptimized VMDK that holds a disk of *capacity* bytes.

    Raises CorruptImage at any grain up to the end of the stream. So do not trust the extents before the last one.
    Memory: one chunk and one grain.
    """
    verifier = StreamOptimized(where, capacity)
    stream = _Pieces(tap(chunks, verifier), where)
    header = parse_header(stream.take(SECTOR), where)
    stream.skip((header.overhead - 1) * SECTOR)
    grain = header.grain_size * SECTOR
    while True:
        piece = stream.take(_MARKER.size)
        value, size, kind = _MARKER.unpack(piece)
        if size:
            rest = -(-(_GRAIN_HEAD + size) // SECTOR) * SECTOR - _MARKER.size
            data = (piece[_GRAIN_HEAD:] + stream.take(rest))[:size]
            yield value * SECTOR, inflate(data, grain, f"{where}, sector {value}", ASK_PUBLISHER)
        elif kind == MARKER_EOS:
            break
        else:
            stream.skip(SECTOR - _MARKER.size + value * SECTOR)
    stream.drain()
    verifier.finish()


class _Pieces:
    """Reader of pieces of any size from a stream of chunks."""

    def __init__(self, chunks: Iterator[bytes], where: str) -> None:
        self._chunks = chunks
        self._where = where
        self._held = b""
        self._at = 0
        self._read = 0

    def take(self, size: int) -> bytes:
        """Return exactly *size* bytes. Raises CorruptImage if the stream ends before."""
        while len(self._held) - self._at < size:
            self._held = self._held[self._at :] + self._next()
            self._at = 0
        self._at += size
        self._read += size
        return self._held[self._at - size : self._at]

    def skip(self, size: int) -> None:
        """Skip *size* bytes."""
        self._read += size
        self._at += size
        while self._at > len(self._held):
            self._at -= len(self._held)
            self._held = self._next()

    def drain(self) -> None:
        """Read to the end."""
        for _ in self._chunks:
            pass

    def _next(self) -> bytes:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise cut_short("there is no end-of-stream marker", self._read, self._where)
        return chunk


def check_order(extents: Iterable[Extent], capacity: int, where: str) -> Iterator[Extent]:
    """Yield the extents, cut at the end of the disk. Raises CorruptImage for one out of order or behind the end."""
    at = 0
    for offset, data in extents:
        if offset < at or offset >= capacity:
            raise corrupt(f"Data for offset {offset} follows data up to {at}, on a disk of {capacity} bytes", where)
        at = offset + len(data)
        yield offset, data[: capacity - offset] if at > capacity else data


def zeros(size: int) -> Iterator[bytes]:
    """Yield chunks of zeros, *size* bytes in total. Some stores keep no blocks for them."""
    while size > 0:
        yield _HOLE[:size]
        size -= CHUNK


def merge_chunks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in larger chunks, because each chunk has a cost when it changes the thread."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        if held and size + len(chunk) > CHUNK:
            yield b"".join(held)
            held, size = [], 0
        held.append(chunk)
        size += len(chunk)
    if held:
        yield b"".join(held)
