"""xz streams of many blocks, which `xz -T` writes: several blocks are unpacked at once. The .xz File Format, 1.2.1.

    stream header   0 magic · 6 flags: the kind of check · 8 CRC-32            12 bytes
    block           0 its header's size / 4 - 1 · 1 flags · [packed] [unpacked] · filters · CRC-32, data, padding, check
    index           00 · records · (block without padding, unpacked) for each · padding · CRC-32
    footer          0 CRC-32 · 4 index size / 4 - 1 · 8 flags · 10 "YZ"        12 bytes

liblzma unpacks and checks each block, as a stream of its own without an end; what holds them together is read here.
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
from .liblzma import LZMADecompressor

_HEADER = 12
_MAGIC, _END = b"\xfd7zXZ\0", b"YZ"
#: Bytes of a block's check by its kind (2.1.1.2).
_CHECKS = {0: 0, 1: 4, 4: 8, 10: 32}
_HAS_PACKED, _HAS_UNPACKED = 0x40, 0x80
#: Blocks larger than this, packed or unpacked, are not held: `xz -6 -T` makes 24 MiB, `-9` 192.
MAX_BLOCK = 32 * MiB
#: Blocks at once. There are two cores to a transfer, and one of them hashes half of the time.
_AT_ONCE = 2


class _Block(NamedTuple):
    #: Its header, data and check.
    size: int
    padding: int
    unpacked: int


def has_blocks(head: bytes) -> bool:
    """Whether the stream that begins so is worth it: its first block says its sizes, and is not all of a large one."""
    try:
        block = _block(head[_HEADER:], head[7:8]) if head.startswith(_MAGIC) and len(head) > _HEADER else None
    except lzma.LZMAError:
        return False  # liblzma says best what is wrong with it
    return block is not None and max(block.size, block.unpacked) <= MAX_BLOCK


def stream(pull: ExactReader, memory: int) -> Iterator[bytes]:
    """The bytes inside one stream, up to its end. Raises LZMAError for a damaged one, EOFError for one cut short.

    Bytes: holds three blocks, packed and unpacked, at the most. *memory* is what liblzma may allocate for each.
    """
    header = pull.exactly(_HEADER)
    done: list[_Block] = []
    with ThreadPoolExecutor(_AT_ONCE, "xz") as pool:
        waiting: deque[Future[list[bytes]]] = deque()
        try:
            for block, data in _blocks(pull, header):
                done.append(block)
                waiting.append(pool.submit(_unpacked, header + data, block.unpacked, memory))
                if len(waiting) > _AT_ONCE:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
    _check_index(pull, header, done)


def _blocks(pull: ExactReader, header: bytes) -> Iterator[tuple[_Block, bytes]]:
    """Each block, with all of its bytes; the index's first byte is handed out again."""
    while (first := pull.exactly(1)) != b"\0":
        head = first + pull.exactly((first[0] + 1) * 4 - 1)
        block = _block(head, header[7:8])
        if block is None or max(block.size, block.unpacked) > MAX_BLOCK:
            raise lzma.LZMAError("a block is larger than the first ones, or does not say its size")
        yield block, head + pull.exactly(block.size + block.padding - len(head))
    pull.push_back(first)


def _block(head: bytes, check: bytes) -> _Block | None:
    """What a block's header says, if it says both sizes; *check* is the second byte of the stream's flags."""
    if len(head) < 2 or not head[0] or check[0] not in _CHECKS or head[1] & 0xC0 != _HAS_PACKED | _HAS_UNPACKED:
        return None
    sizes = head + bytes(18)  # of a header that is cut short: numbers that end
    packed, at = _number(sizes, 2)
    unpacked, _ = _number(sizes, at)
    size = (head[0] + 1) * 4 + packed + _CHECKS[check[0]]
    return _Block(size, -packed % 4, unpacked)


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends (1.2)."""
    value = 0
    for shift in range(0, 63, 7):
        byte = data[at + shift // 7]
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at + shift // 7 + 1
    raise lzma.LZMAError("a number has more than nine bytes")


def _unpacked(data: bytes, size: int, memory: int) -> list[bytes]:
    decoder = LZMADecompressor(lzma.FORMAT_XZ, memlimit=memory)
    chunks = [decoder.decompress(data, CHUNK)]
    while not decoder.needs_input:
        chunks.append(decoder.decompress(b"", CHUNK))
    if sum(map(len, chunks)) != size:
        raise lzma.LZMAError("a block is not as large as it says")
    return [each for each in chunks if each]


def _check_index(pull: ExactReader, header: bytes, blocks: list[_Block]) -> None:
    """The index names just these blocks, and the footer this index."""
    records = b"".join(_as_number(number) for each in blocks for number in (each.size, each.unpacked))
    index = b"\0" + _as_number(len(blocks)) + records
    index += bytes(-len(index) % 4)
    index += struct.pack("<I", zlib.crc32(index))
    footer = struct.pack("<I2s", len(index) // 4 - 1, header[6:8])
    footer = struct.pack("<I", zlib.crc32(footer)) + footer + _END
    if pull.exactly(len(index)) != index or pull.exactly(_HEADER) != footer:
        raise lzma.LZMAError("its index names other blocks")


def _as_number(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*data, value))
