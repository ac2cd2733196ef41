"""Files that contain an image, good and bad: compressed streams, and zip and tar archives made byte by byte."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable

from ssvm_worker.unpacking.compression import zstd

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstandard": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
}


def xz_with_dictionary(size: int) -> bytes:
    """Return an xz stream that needs a dictionary of *size* bytes. The size is in one byte of its header (xz 5.3.1)."""
    code = next(code for code in range(41) if (2 | code & 1) << (code // 2 + 11) >= size)
    data = bytearray(lzma.compress(b"x" * 100))
    at = data.index(b"\x21\x01", 12) + 2  # The filter's id, and the length of its properties.
    data[at] = code
    header = 12 + (data[12] + 1) * 4
    data[header - 4 : header] = struct.pack("<I", zlib.crc32(data[12 : header - 4]))
    return bytes(data)


def zstd_with_window(log: int) -> bytes:
    """Return a zstandard frame that needs a window of 2^log bytes."""
    return struct.pack("<IBB", 0xFD2FB528, 0, (log - 10) << 3) + b"\x01\x00\x00"


def zip_of(
    data: bytes,
    name: bytes = b"disk.raw",
    more: bytes = b"",
    streamed: bool = False,
    local: dict[str, int] | None = None,
    entry: dict[str, int] | None = None,
) -> bytes:
    """Return a zip of one deflated member. *local* and *entry* change fields of its header and of its directory entry.

    *streamed* puts the sizes behind the data. *more* is between the member and the directory.
    """
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(data) + packer.flush()
    true = {
        "flags": 8 if streamed else 0,
        "method": 8,
        "crc": zlib.crc32(data),
        "packed": len(packed),
        "size": len(data),
    }
    here = true | ({"crc": 0, "packed": 0, "size": 0} if streamed else {}) | (local or {})
    head = struct.pack("<4sH", b"PK\x03\x04", 20) + _zip_fields(here) + struct.pack("<HH", len(name), 0) + name
    behind = b"PK\x07\x08" + struct.pack("<III", true["crc"], len(packed), len(data)) if streamed else b""
    there = {"offset": 0} | true | (entry or {})
    directory = struct.pack("<4sHH", b"PK\x01\x02", 20, 20) + _zip_fields(there)
    directory += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, there["offset"]) + name
    at = len(head) + len(packed) + len(behind) + len(more)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), at, 0)
    return head + packed + behind + more + directory + end


def _zip_fields(values: dict[str, int]) -> bytes:
    return struct.pack("<HHIIII", values["flags"], values["method"], 0, values["crc"], values["packed"], values["size"])


def tar_member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """Return a header and the data of one member. *fields* are those of tarfile.TarInfo."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for field, value in fields.items():
        setattr(info, field, value)
    form = tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT
    return info.tobuf(form) + data + bytes(-len(data) % 512)


def tar_of(*members: bytes) -> bytes:
    """Return an archive of these members, with its end."""
    return b"".join(members) + bytes(1024)


def tar_by_library(files: dict[str, bytes], form: int) -> bytes:
    """Return plain files as an archive of Python's tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def ovf_of(*disks: str, others: tuple[str, ...] = (), inside: str = "") -> bytes:
    """Return a descriptor of these files, in VMware's form. *inside* is the text of its References."""
    files = "".join(f'<File ovf:href="{name}" ovf:id="file{n}" ovf:size="1"/>' for n, name in enumerate(disks + others))
    listed = "".join(
        f'<Disk ovf:capacity="1" ovf:diskId="vmdisk{n}" ovf:fileRef="file{n}"/>' for n in range(len(disks))
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">'
        f"<References>{files}{inside}</References><DiskSection><Info/>{listed}</DiskSection></Envelope>\n"
    ).encode()


def ovf_with_hardware(*disks: str, others: tuple[str, ...] = ()) -> bytes:
    """Return a descriptor of disks of 1 GiB at one SCSI controller, as vSphere writes it."""
    rasd = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
    controller = (
        "<Item><rasd:InstanceID>3</rasd:InstanceID><rasd:ElementName>SCSI Controller 0</rasd:ElementName>"
        "<rasd:ResourceSubType>lsilogic</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>"
    )
    items = "".join(
        f"<Item><rasd:InstanceID>{n + 4}</rasd:InstanceID><rasd:Parent>3</rasd:Parent>"
        f"<rasd:HostResource>ovf:/disk/vmdisk{n}</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>"
        for n in range(len(disks))
    )
    hardware = f'<VirtualSystem ovf:id="vm"><VirtualHardwareSection>{controller}{items}</VirtualHardwareSection>'
    text = ovf_of(*disks, others=others).decode()
    text = text.replace('capacity="1"', 'capacity="1" ovf:capacityAllocationUnits="byte * 2^30"')
    text = text.replace("<Envelope ", f'<Envelope xmlns:rasd="{rasd}" ')
    return text.replace("</Envelope>", f"{hardware}</VirtualSystem></Envelope>").encode()


def mf_of(files: dict[str, bytes], algorithm: str = "sha256") -> bytes:
    """Return a checksum file of these files."""
    lines = (
        f"{algorithm.upper()}({name})= {hashlib.new(algorithm, data).hexdigest()}\n" for name, data in files.items()
    )
    return "".join(lines).encode()


def ova_of(files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return an OVA of these files, in this order."""
    return tar_by_library(files, form)
