"""Progress markers in a streamOptimized VMDK, as VMware's published writer sends them in empty areas of a disk.

Source: StreamVmdkWriter.java in the archive of VMware's Photon Controller. It is not known whether ESXi hosts do it.
"""

from __future__ import annotations

import struct

_SECTOR = 512
#: Value, size and kind. A grain has a size. Other markers have the number of the sectors that follow as their value.
_MARKER = struct.Struct("<QII")
_GRAIN_HEAD = 12
_END, _TABLE, _DIRECTORY, _FOOTER, _PROGRESS = range(5)
#: Where a header has the sector of its grain directory, and the number of sectors before the first grain.
_DIRECTORY_AT, _OVERHEAD_AT = 56, 64


def with_progress_markers(stream: bytes, *, dirty: bool) -> bytes:
    """Return the stream with a progress marker before each grain. Other data than a VMDK is returned unchanged.

    With *dirty*, the padding of each later marker has left-over bytes: that writer does not clear its buffer.
    """
    if not stream.startswith(b"KDMV"):
        return stream
    at = int.from_bytes(stream[_OVERHEAD_AT : _OVERHEAD_AT + 8], "little") * _SECTOR
    made, reached = bytearray(stream[:at]), b""
    #: The new sector of each grain, table and directory.
    moved: dict[int, int] = {}

    def marker(value: int, kind: int) -> bytes:
        return (_MARKER.pack(value, 0, kind) + (reached if dirty else b"")).ljust(_SECTOR, b"\0")

    while at < len(stream):
        value, size, kind = _MARKER.unpack_from(stream, at)
        if size:
            reached = value.to_bytes(8, "little")
            made += _MARKER.pack(0, 0, _PROGRESS) + reached.ljust(_SECTOR - _MARKER.size, b"\0")
            end = at + -(-(_GRAIN_HEAD + size) // _SECTOR) * _SECTOR
            moved[at // _SECTOR] = len(made) // _SECTOR
            made += stream[at:end]
        else:
            end = at + (1 + value) * _SECTOR
            made += marker(value, kind)
            moved[at // _SECTOR + 1] = len(made) // _SECTOR
            made += _moved(stream[at + _SECTOR : end], kind, moved)
        at = end
    return bytes(made)


def _moved(body: bytes, kind: int, moved: dict[int, int]) -> bytes:
    """Return the sectors behind a marker with the new sectors of what they refer to."""
    if kind in (_TABLE, _DIRECTORY):
        entries = struct.unpack(f"<{len(body) // 4}I", body)
        return struct.pack(f"<{len(entries)}I", *(moved.get(each, each) for each in entries))
    if kind == _FOOTER:
        directory = int.from_bytes(body[_DIRECTORY_AT : _DIRECTORY_AT + 8], "little")
        place = moved.get(directory, directory).to_bytes(8, "little")
        return body[:_DIRECTORY_AT] + place + body[_DIRECTORY_AT + 8 :]
    return body
