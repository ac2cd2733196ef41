"""Refuse known files that are not supported: wrappers, other disk formats, and error pages of servers.

A magic of fewer than three bytes is not listed, because a raw disk may begin with any bytes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ssvm_worker.errors import UnknownFormat

_UNPACK = "Unpack it, and give the URL of the image inside"
_CONVERT = "Convert it: qemu-img convert -O qcow2 IN OUT"
_DECRYPT = "Decrypt it: without its key, its content can be neither checked nor booted"


class _Magic(NamedTuple):
    #: Offset of the magic in the file.
    offset: int
    magic: bytes
    #: Name for a user.
    name: str
    remedy: str


_MAGICS = (
    _Magic(0, b"\x1f\x8b\x08", "a gzip archive", _UNPACK),
    _Magic(0, b"BZh", "a bzip2 archive", _UNPACK),
    _Magic(0, b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    _Magic(0, b"\x28\xb5\x2f\xfd", "a zstandard archive", _UNPACK),
    _Magic(0, b"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    _Magic(0, b"PK\x03\x04", "a zip archive", _UNPACK),
    _Magic(0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    _Magic(0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    _Magic(0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    _Magic(257, b"ustar", "a tar archive (an OVA is one)", _UNPACK),
    _Magic(0, b"COWD", "a VMDK of ESX's sparse format (COWD)", _CONVERT),
    _Magic(0, b"\xbe\xba\xfe\xca\0\0\0\0", "a VMDK of ESX's space-efficient format (SE sparse)", _CONVERT),
    _Magic(0, b"QED\0", "a QED image", _CONVERT),
    _Magic(64, b"\x7f\x10\xda\xbe", "a VDI image (VirtualBox)", _CONVERT),
    _Magic(0, b"WithoutFreeSpace", "a Parallels image", _CONVERT),
    _Magic(0, b"WithouFreSpacExt", "a Parallels image", _CONVERT),
    _Magic(0, b"OOOM", "a COW image (User-mode Linux)", _CONVERT),
    _Magic(0, b"Bochs Virtual HD Image", "a Bochs image", _CONVERT),
    _Magic(0, b"VMA\0", "a Proxmox backup (VMA)", _UNPACK),
    _Magic(0, b"MSWIM\0\0\0", "a Windows image (WIM)", _UNPACK),
    _Magic(0, b"LUKS\xba\xbe", "an encrypted disk (LUKS)", _DECRYPT),
    _Magic(0, b"SKUL\xba\xbe", "an encrypted disk (the second header of LUKS2)", _DECRYPT),
    _Magic(0, b"-FVE-FS-", "an encrypted disk (BitLocker)", _DECRYPT),
)
_HTML = re.compile(rb"\s*(?:<!doctype\s+html|<html|<head|<body|<\?xml|<!--|<error>)", re.IGNORECASE)
_NOT_AN_IMAGE = "Open the URL in a browser: the server may require a login, or the file has moved"


def refuse_foreign(head: bytes, where: str) -> None:
    """Raise UnknownFormat for a known file that is not supported. The error names its format."""
    if not head:
        raise UnknownFormat("The image is empty", where, _NOT_AN_IMAGE)
    for offset, magic, name, remedy in _MAGICS:
        if head.startswith(magic, offset):
            raise UnknownFormat(f"This is {name}, which is not supported", where, remedy)
    if _HTML.match(head[:512].removeprefix(b"\xef\xbb\xbf")):
        raise UnknownFormat("The server sent HTML or XML, not an image", where, _NOT_AN_IMAGE)


def refuse_text(head: bytes, where: str) -> None:
    """Raise UnknownFormat for plain text. Call this only if the request does not declare a raw disk.

    All of the head must be text: a disk may begin with a sector of letters.
    """
    start = head[:512]
    for data in (start, head):
        if not data.isascii() or not data.decode("ascii").translate({9: " ", 10: " ", 13: " "}).isprintable():
            return
    raise UnknownFormat(f"The server sent text, not an image: {start[:60].decode()!a}", where, _NOT_AN_IMAGE)
