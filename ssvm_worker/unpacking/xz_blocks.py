"""Unpack several blocks of an xz stream at once (The .xz File Format, 1.2.1). `xz -T` writes such streams.

    stream header   0 magic · 6 flags: the kind of check · 8 CRC-32            12 bytes
    block           0 its header's size / 4 - 1 · 1 flags · [packed] [unpacked] · filters · CRC-32, data, padding, check
    index           00 · records · (block without padding, unpacked) for each · padding · CRC-32
    footer          0 CRC-32 · 4 index size / 4 - 1 · 8 flags · 10 "YZ"        12 bytes

This module reads the stream header, the index and the footer. liblzma unpacks and checks each block. It gets a block
as one stream without an end.

liblzma comes from the extra ``xz``, where it is 5.8 or newer. Without the extra it is the liblzma of Python. Before
5.6 it took 1.6 times as long for the same stream. The distributions of 2023 and 2024 have 5.4. Both raise
``lzma.LZMAError``.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.units import MiB

from .exact_reader import ExactReader

try:
    from lzma_mt import LZMADecompressor
except ImportError:
    from lzma import LZMADecompressor  # type: ignore[assignment]  # it has the same methods

__all__ = ["MAX_BLOCK", "LZMADecompressor", "has_blocks", "stream"]

_HEADER = 12
_MAGIC, _END = b"\xfd7zXZ\0", b"YZ"
#: Bytes of a block's check, by the kind of check (2.1.1.2).
_CHECKS = {0: 0, 1: 4, 4: 8, 10: 32}
_HAS_PACKED, _HAS_UNPACKED = 0x40, 0x80
#: Larger blocks, packed or unpacked, are not held. `xz -6 -T` makes blocks of 24 MiB, `-9` of 192 MiB.
MAX_BLOCK = 32 * MiB
#: Blocks that are unpacked at once. A transfer has two cores, and one of them hashes half of the time.
_PARALLEL = 2


class _Block(NamedTuple):
    #: Bytes of its header, data and check.
    size: int
    padding: int
    unpacked: int


def has_blocks(head: bytes) -> bool:
    """Return whether parallel unpacking helps: the first block states its sizes and is not too large."""
    try:
        block = _block(head[_HEADER:], head[7:8]) if head.startswith(_MAGIC) and len(head) > _HEADER else None
    except lzma.LZMAError:
        return False  # liblzma then reports what is wrong
    return block is not None and max(block.size, block.unpacked) <= MAX_BLOCK


def stream(reader: ExactReader, max_memory: int) -> Iterator[bytes]:
    """Yield the bytes inside one stream. Raises LZMAError if it is damaged, EOFError if it is cut short.

    Memory: at most three blocks, packed and unpacked. liblzma may allocate *max_memory* bytes for each.
    """
    header = reader.exactly(_HEADER)
    done: list[_Block] = []
    with ThreadPoolExecutor(_PARALLEL, "xz") as pool:
        waiting: deque[Future[list[bytes]]] = deque()
        try:
            for block, data in _blocks(reader, header):
                done.append(block)
                waiting.append(pool.submit(_unpack, header + data, block.unpacked, max_memory))
                if len(waiting) > _PARALLEL:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
    _check_index(reader, header, done)


def _blocks(reader: ExactReader, header: bytes) -> Iterator[tuple[_Block, bytes]]:
    """Yield each block with all of its bytes. Push the first byte of the index back."""
    while (first := reader.exactly(1)) != b"\0":
        head = first + reader.exactly((first[0] + 1) * 4 - 1)
        block = _block(head, header[7:8])
        if block is None or max(block.size, block.unpacked) > MAX_BLOCK:
            raise lzma.LZMAError("a block is larger than the first ones, or does not state its size")
        yield block, head + reader.exactly(block.size + block.padding - len(head))
    reader.push_back(first)


def _block(head: bytes, check: bytes) -> _Block | None:
    """Parse a block header. Return None unless it states both sizes. *check* is the second byte of the stream flags."""
    if len(head) < 2 or not head[0] or check[0] not in _CHECKS or head[1] & 0xC0 != _HAS_PACKED | _HAS_UNPACKED:
        return None
    sizes = head + bytes(18)  # zeros end a number if the header is cut short
    packed, at = _number(sizes, 2)
    unpacked, _ = _number(sizes, at)
    size = (head[0] + 1) * 4 + packed + _CHECKS[check[0]]
    return _Block(size, -packed % 4, unpacked)


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of seven bits per byte, the lowest first, and the position behind it (1.2)."""
    value = 0
    for shift in range(0, 63, 7):
        byte = data[at + shift // 7]
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at + shift // 7 + 1
    raise lzma.LZMAError("a number has more than nine bytes")


def _unpack(data: bytes, size: int, max_memory: int) -> list[bytes]:
    decoder = LZMADecompressor(lzma.FORMAT_XZ, memlimit=max_memory)
    chunks = [decoder.decompress(data, CHUNK)]
    while not decoder.needs_input:
        chunks.append(decoder.decompress(b"", CHUNK))
    if sum(map(len, chunks)) != size:
        raise lzma.LZMAError("a block does not have the size that it states")
    return [each for each in chunks if each]


def _check_index(reader: ExactReader, header: bytes, blocks: list[_Block]) -> None:
    """Raise LZMAError unless the index lists exactly these blocks, and the footer matches the index."""
    records = b"".join(_encoded(number) for each in blocks for number in (each.size, each.unpacked))
    index = b"\0" + _encoded(len(blocks)) + records
    index += bytes(-len(index) % 4)
    index += struct.pack("<I", zlib.crc32(index))
    footer = struct.pack("<I2s", len(index) // 4 - 1, header[6:8])
    footer = struct.pack("<I", zlib.crc32(footer)) + footer + _END
    if reader.exactly(len(index)) != index or reader.exactly(_HEADER) != footer:
        raise lzma.LZMAError("its index lists other blocks")


def _encoded(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*data, value))
