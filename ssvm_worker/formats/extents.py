"""The data of a disk as extents: pieces of (offset, bytes) in the order of the disk, none where it has nothing."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.streaming.isal_zlib import inflate

from .detect import ASK_PUBLISHER, corrupt, cut_short
from .stream_optimized import StreamOptimized
from .vmdk import MARKER_EOS, SECTOR, parse_header

#: Bytes of the disk from its beginning, and what is there.
Extent = tuple[int, bytes]

_MARKER = struct.Struct("<QII")
#: Bytes of a grain's marker; its data begins here.
_GRAIN_HEAD = 12
_HOLE = bytes(CHUNK)


def vmdk_extents(chunks: Iterable[bytes], where: str, capacity: int) -> Iterator[Extent]:
    """The grains of a streamOptimized VMDK that holds a disk of *capacity* bytes.

    Raises CorruptImage, from the first grain to the end of the stream: judge what was made of the extents only when
    all have come. Bytes: holds one chunk and one grain.
    """
    verifier = StreamOptimized(where, capacity)
    stream = _Pieces(_seen_by(verifier, chunks), where)
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


def _seen_by(verifier: StreamOptimized, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The structure is judged before anybody follows it."""
    for chunk in chunks:
        verifier(chunk)
        yield chunk


class _Pieces:
    """A stream of chunks, taken in pieces of any size."""

    def __init__(self, chunks: Iterator[bytes], where: str) -> None:
        self._chunks = chunks
        self._where = where
        self._held = b""
        self._at = 0
        self._taken = 0

    def take(self, size: int) -> bytes:
        """Just so many bytes; CorruptImage if the stream ends before."""
        while len(self._held) - self._at < size:
            self._held = self._held[self._at :] + self._next()
            self._at = 0
        self._at += size
        self._taken += size
        return self._held[self._at - size : self._at]

    def skip(self, size: int) -> None:
        """Step over so many bytes."""
        self._taken += size
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
            raise cut_short("there is no end-of-stream marker", self._taken, self._where)
        return chunk


def in_order(extents: Iterable[Extent], capacity: int, where: str) -> Iterator[Extent]:
    """The extents without what lies beyond the disk's end; CorruptImage where one comes too late, or outside."""
    at = 0
    for offset, data in extents:
        if offset < at or offset >= capacity:
            raise corrupt(f"Data comes for offset {offset} behind {at}, of a disk of {capacity} bytes", where)
        at = offset + len(data)
        yield offset, data[: capacity - offset] if at > capacity else data


def holes(size: int) -> Iterator[bytes]:
    """Chunks of zeros, *size* bytes in all; a store that can keeps no blocks for them."""
    while size > 0:
        yield _HOLE[:size]
        size -= CHUNK


def gathered(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in larger chunks: what is handed from thread to thread must be worth it."""
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
