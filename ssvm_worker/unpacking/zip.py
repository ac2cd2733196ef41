r"""Read a zip archive of one member while it passes: PKWARE's APPNOTE.TXT 6.3.10 (little-endian).

    local header   0 "PK\3\4" · 6 flags · 8 method · 14 CRC · 18 packed · 22 unpacked · 26 name · 28 extra, lengths
    descriptor     behind the data where flag bit 3 is set: ["PK\7\8"] CRC packed unpacked, of 4 or of 8 bytes each
    directory      "PK\1\2" · 8 flags · 10 method · 16 CRC · 20 packed · 24 unpacked · 28 name, extra, comment
                   42 offset
    end            [zip64 "PK\6\6" and "PK\6\7"] "PK\5\6" · 8 entries · 10 entries · 20 comment

The directory at the end must match the local header. So no other reader can find another member.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from typing import NamedTuple

from isal import igzip_lib, isal_zlib

from ssvm_worker.errors import CorruptImage, UnknownFormat, UnsafeImage
from ssvm_worker.streaming.interfaces import CHUNK

from .compression import AGAIN, IGZIP_ERROR
from .exact_reader import ExactReader

_LOCAL, _DESCRIPTOR, _ENTRY = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02"
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
MAGICS = (_LOCAL, _END)
_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_SIZES_BEHIND = 1 << 3
_STORED, _DEFLATED = 0, 8
_IN_ZIP64 = 0xFFFFFFFF
_ONE = "Pack the image alone, as one deflated member"


class _Header(NamedTuple):
    flags: int
    method: int
    crc: int
    packed: int
    unpacked: int
    name: bytes


class _Sizes(NamedTuple):
    crc: int
    packed: int
    unpacked: int


def member(reader: ExactReader, where: str) -> Iterator[bytes]:
    """Yield the bytes of the only member.

    Raises UnsafeImage, UnknownFormat or CorruptImage for any other archive.
    """
    try:
        header = _local_header(reader, where)
        found = yield from _data(reader, header, where)
        announced = _descriptor(reader) if header.flags & _SIZES_BEHIND else _Sizes(*header[2:5])
        if found != announced:
            raise CorruptImage(f"The zip member is {found}, but its header says {announced}", where, AGAIN)
        _check_directory(reader, header, found, where)
    except EOFError as error:
        raise CorruptImage(f"The zip archive is cut short: {error}", where, AGAIN) from error


def _local_header(reader: ExactReader, where: str) -> _Header:
    if reader.exactly(4) == _END:
        raise UnknownFormat("The zip archive is empty", where, _ONE)
    fields = reader.exactly(26)
    flags, method, _when, crc, packed, unpacked, name_length, extra_length = struct.unpack_from("<HHIIIIHH", fields, 2)
    name = reader.exactly(name_length)
    packed, unpacked, _ = _in_zip64(reader.exactly(extra_length), unpacked, packed)
    _check_name(name, where)
    if flags & _ENCRYPTED:
        raise UnsafeImage("The zip member is encrypted", where, "Its content cannot be checked. " + _ONE)
    if method not in (_STORED, _DEFLATED) or (method == _STORED and flags & _SIZES_BEHIND):
        raise UnknownFormat(f"The zip member is packed with method {method}, which is not supported", where, _ONE)
    return _Header(flags, method, crc, packed, unpacked, name)


def _check_name(name: bytes, where: str) -> None:
    """Raise an error for a name that attacks other readers. The worker itself does not use the name."""
    parts = name.replace(b"\\", b"/").split(b"/")
    if not name or b"\0" in name or b".." in parts or parts[0] == b"" or parts[0].endswith(b":"):
        raise UnsafeImage(f"The name of the zip member points outside the archive: {name[:80]!a}", where, _ONE)
    if not parts[-1]:
        raise UnknownFormat(f"The zip archive contains a directory: {name[:80]!a}", where, _ONE)


def _in_zip64(extra: bytes, unpacked: int, packed: int, offset: int = 0) -> tuple[int, int, int]:
    """Return packed size, unpacked size and offset. A number of all ones is in the zip64 field (id 1, 4.5.3)."""
    at, values = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = extra[at + 4 : at + 4 + length]
        at += 4 + length
    numbers = iter(struct.unpack_from(f"<{len(values) // 8}Q", values))
    unpacked, packed, offset = (
        next(numbers, each) if each == _IN_ZIP64 else each for each in (unpacked, packed, offset)
    )
    return packed, unpacked, offset


def _data(reader: ExactReader, header: _Header, where: str) -> Generator[bytes, None, _Sizes]:
    """Yield the member's bytes. Return their CRC, packed and unpacked size."""
    begin, crc, unpacked = reader.position, 0, 0
    for chunk in _inflated(reader, where) if header.method == _DEFLATED else _stored(reader, header.packed):
        crc = isal_zlib.crc32(chunk, crc)
        unpacked += len(chunk)
        yield chunk
    return _Sizes(crc, reader.position - begin, unpacked)


def _stored(reader: ExactReader, remaining: int) -> Iterator[bytes]:
    while remaining:
        chunk = reader.some(min(remaining, CHUNK))
        if not chunk:
            raise EOFError(f"{remaining} bytes are missing at offset {reader.position}")
        remaining -= len(chunk)
        yield chunk


def _inflated(reader: ExactReader, where: str) -> Iterator[bytes]:
    decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
    while not decoder.eof:
        data = reader.some() if decoder.needs_input else b""
        if decoder.needs_input and not data:
            raise EOFError(f"the member does not end before offset {reader.position}")
        try:
            chunk = decoder.decompress(data, CHUNK)
        except IGZIP_ERROR as error:
            raise CorruptImage(f"The zip member is damaged: {error}", where, AGAIN) from error
        if chunk:
            yield chunk
    reader.push_back(decoder.unused_data)


def _descriptor(reader: ExactReader) -> _Sizes:
    """Read the data descriptor behind the data.

    Its sizes have 4 or 8 bytes, and no field says which. The directory entry must follow, so its magic decides.
    """
    data = reader.exactly(12)
    if data.startswith(_DESCRIPTOR):
        data = data[4:] + reader.exactly(4)
    data += reader.exactly(4)
    if data[12:] == _ENTRY:
        reader.push_back(_ENTRY)
        return _Sizes(*struct.unpack("<III", data[:12]))
    data += reader.exactly(4)
    return _Sizes(*struct.unpack("<IQQ", data))


def _check_directory(reader: ExactReader, header: _Header, found: _Sizes, where: str) -> None:
    """Raise an error unless the directory lists exactly this member and ends the file."""
    begin = reader.position
    entry = reader.exactly(4)
    if entry == _LOCAL:
        raise UnknownFormat("The zip archive has more than one member", where, _ONE)
    entry += reader.exactly(42) if entry == _ENTRY else bytes(42)
    flags, method, _when, *sizes = struct.unpack_from("<HHIIII", entry, 8)
    name_length, extra_length, comment_length = struct.unpack_from("<HHH", entry, 28)
    name = reader.exactly(name_length)
    packed, unpacked, offset = _in_zip64(
        reader.exactly(extra_length), sizes[2], sizes[1], struct.unpack_from("<I", entry, 42)[0]
    )
    reader.exactly(comment_length)
    listed = (entry[:4], flags, method, _Sizes(sizes[0], packed, unpacked), name, offset)
    if listed != (_ENTRY, header.flags, header.method, found, header.name, 0):
        raise UnsafeImage("The directory of the zip archive contradicts its member", where, _ONE)
    _check_end(reader, begin, where)


def _check_end(reader: ExactReader, directory_at: int, where: str) -> None:
    size = reader.position - directory_at
    magic = reader.exactly(4)
    if magic == _ENTRY:
        raise UnknownFormat("The zip archive has more than one member", where, _ONE)
    if magic == _END64:
        reader.exactly(min(struct.unpack("<Q", reader.exactly(8))[0], CHUNK))
        magic = reader.exactly(4)
    if magic == _LOCATOR64:
        reader.exactly(16)
        magic = reader.exactly(4)
    _disk, _start, here, entries, length, at, comment = struct.unpack("<HHHHIIH", reader.exactly(18))
    reader.exactly(comment)
    is_valid = magic == _END and here == entries == 1 and length == size and at in (directory_at, _IN_ZIP64)
    if not is_valid or reader.some():
        what = "The end record of the zip archive contradicts its directory, or data follows it"
        raise UnsafeImage(what, where, _ONE)
