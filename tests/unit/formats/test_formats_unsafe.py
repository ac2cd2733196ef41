"""Refused images: those that refer to other files, hide content, or are no images at all."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from ssvm_worker.errors import AmbiguousFormat, CorruptImage, ImageError, UnknownFormat, UnsafeImage
from ssvm_worker.formats import FORMATS, ImageInfo, Inspection
from tests.images import (
    GD_AT_END,
    gpt,
    iso,
    overlay,
    qcow2,
    qcow2_backed_by,
    qcow2_data_file,
    stream_optimized,
    vhd_dynamic,
    vhd_fixed,
    vhd_footer,
    vhdx,
    vmdk_descriptor,
    vmdk_header,
)
from tests.neighbours import missing

NOISE = random.Random(2).randbytes(70_000)
Row = tuple[bytes, type[ImageError], str]


def inspect(image: bytes, expected: str = "auto") -> ImageInfo:
    """Return the inspection of bytes that arrive in small chunks."""
    inspection = Inspection(expected, where="http://example.test/disk.img")
    for at in range(0, len(image), 100_000):
        inspection(image[at : at + 100_000])
    return inspection.finish()


def refuse(image: bytes, error: type[ImageError], text: str, expected: str = "auto") -> None:
    """Check that the bytes give that error, with a position and a remedy in its text."""
    with pytest.raises(error, match=text) as caught:
        inspect(image, expected)
    assert caught.value.where == "http://example.test/disk.img"
    assert caught.value.remedy


def table(rows: dict[str, Row]) -> pytest.MarkDecorator:
    """Return the rows as test cases, named by their keys."""
    return pytest.mark.parametrize(("image", "error", "text"), rows.values(), ids=rows.keys())


BACKING = ("/etc/passwd", "../../secret", "base.qcow2", "/dev/sda", "nbd://10.0.0.1/disk", 'json:{"driver":"file"}')


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", BACKING)
def test_backing_file(name: str, version: int) -> None:
    """The error of a qcow2 with a backing file names that file."""
    refuse(qcow2_backed_by(name, version=version), UnsafeImage, "names a backing file: .*Flatten it: qemu-img convert")
    with pytest.raises(UnsafeImage) as caught:
        Inspection()(qcow2_backed_by(name, version=version) + bytes(2 << 20))
    assert ascii(name)[1:-1] in str(caught.value)


@table(
    {
        "a data file": (qcow2_data_file("/etc/shadow"), UnsafeImage, "its data in another file: /etc/shadow"),
        "a raw data file": (qcow2_data_file("x", autoclear=2), UnsafeImage, "its data in another file: x"),
        "a data file without a name": (qcow2(incompatible=4), UnsafeImage, "cannot be read"),
        "a backing file outside the head": (
            qcow2(backing_offset=1 << 40, backing_size=9),
            UnsafeImage,
            "cannot be read",
        ),
        "a backing file's length alone": (qcow2(backing_size=9), UnsafeImage, "names a backing file"),
        "a name full of control characters": (qcow2_backed_by("\x1b[2J\n/x"), UnsafeImage, r"\\x1b\[2J\\n/x"),
        "an unknown feature": (qcow2(incompatible=1 << 5), UnsafeImage, "unknown incompatible features: bit 5"),
        "two unknown features": (qcow2(incompatible=1 << 63 | 1 << 9), UnsafeImage, "bit 9, 63"),
        "subclusters": (qcow2(incompatible=16), UnknownFormat, "subclusters.*extended_l2=off"),
        "the corrupt bit": (qcow2(incompatible=2), CorruptImage, "marked as corrupt.*check -r all"),
        "AES encryption": (qcow2(crypt_method=1), UnsafeImage, r"encrypted \(AES\)"),
        "LUKS encryption": (qcow2(crypt_method=2), UnsafeImage, r"encrypted \(LUKS\)"),
        "an encryption of the future": (qcow2(crypt_method=7), UnsafeImage, r"encrypted \(method 7\)"),
        "version 1": (qcow2(version=1), UnknownFormat, "version 1 of QCOW"),
        "version 4": (qcow2(version=4), UnknownFormat, "version 4 of QCOW"),
        "clusters of 2 GiB": (qcow2(cluster_bits=31), CorruptImage, "2\\^31"),
        "clusters of 256 bytes": (qcow2(cluster_bits=8), CorruptImage, "2\\^8"),
        "a refcount order of 7": (qcow2(refcount_order=7), CorruptImage, "refcount order of 7"),
        "4 EiB": (qcow2(size=1 << 62), CorruptImage, "virtual size of 4611686018427387904"),
        "no size": (qcow2(size=0), CorruptImage, "virtual size of 0"),
        "an L1 table of 16 GiB": (qcow2(l1_size=0x7FFFFFFF), CorruptImage, "L1 table of 2147483647"),
        "an L1 table too small": (qcow2(size=1 << 30), CorruptImage, "L1 table of 1"),
        "an L1 table inside the header": (qcow2(l1_offset=0), CorruptImage, "L1 table at offset 0"),
        "an L1 table between clusters": (qcow2(l1_offset=12289), CorruptImage, "L1 table at offset 12289"),
        "a huge refcount table": (qcow2(refcount_clusters=1 << 20), CorruptImage, "refcount table of 1048576"),
        "no refcount table": (qcow2(refcount_clusters=0), CorruptImage, "refcount table of 0"),
        "a refcount table behind the end": (
            qcow2(refcount_offset=1 << 40),
            CorruptImage,
            "refcount table at 1099511631872",
        ),
        "65535 snapshots": (qcow2(snapshots=65535, snapshots_offset=4096), CorruptImage, "65535 snapshots"),
        "snapshots behind the end": (qcow2(snapshots=9, snapshots_offset=1 << 30), CorruptImage, "it has 9 snapshots"),
        "a header of 4 GiB": (qcow2(header_length=0xFFFFFFF8), CorruptImage, "header has 4294967288 bytes"),
        "a header of 72 bytes": (qcow2(header_length=72), CorruptImage, "header has 72 bytes"),
        "a header cut at its 104th byte": (qcow2()[:104], CorruptImage, "its header has 112 bytes"),
        "an unknown compression": (qcow2(compression=9, incompatible=8), UnknownFormat, "unknown way"),
        "zstd without saying so": (qcow2(compression=1), CorruptImage, "contradicts itself"),
        "zlib said to be another": (qcow2(incompatible=8), CorruptImage, "contradicts itself"),
    }
)
def test_qcow2(image: bytes, error: type[ImageError], text: str) -> None:
    """A qcow2 with external references, hidden content or wrong sizes is refused before any tool opens it."""
    refuse(image, error, text)


FLAT = vmdk_descriptor(8, createType='"monolithicFlat"', extent='RW 8 FLAT "/etc/passwd" 0')
PLAIN = b'version=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 8 FLAT "../x" 0\n'


ALONE = {
    "as it is": FLAT,
    "padded with NULs, as qemu writes it": FLAT.ljust(512, b"\0"),
    "padded to a MiB": FLAT.ljust(1 << 20, b"\0"),
    "with a NUL inside": FLAT.replace(b"version", b"\0version"),
    "with a byte order mark": b"\xef\xbb\xbf" + FLAT,
    "with a byte that is not ASCII": FLAT.replace(b"DescriptorFile", b"Descriptor\xe9File"),
    "with CRLF": FLAT.replace(b"\n", b"\r\n"),
    "in UTF-16": FLAT.decode().encode("utf-16"),
    "in upper case": FLAT.upper(),
    "behind blank lines": b"\n \n\t\n" + FLAT,
    "without its first comment": PLAIN,
    "behind another comment": b"# a disk\n\n# really\n" + PLAIN,
    "with an odd comment": b"#\xff\x00\x01\n" + PLAIN.replace(b"createType", b"x"),
    "without a createType": vmdk_descriptor(8, createType="", extent='RW 8 FLAT "../x" 0'),
    "of 2 GiB pieces": vmdk_descriptor(8, createType='"twoGbMaxExtentSparse"', extent='RW 8 SPARSE "x-s001.vmdk"'),
    "of a whole device": vmdk_descriptor(8, createType='"fullDevice"', extent='RW 8 FLAT "/dev/sda" 0'),
    "that names itself": vmdk_descriptor(8),
}


@pytest.mark.parametrize("expected", ["auto", "raw", "iso", "vmdk"])
@pytest.mark.parametrize("text", ALONE.values(), ids=ALONE.keys())
def test_vmdk_descriptor_alone(text: bytes, expected: str) -> None:
    """A text that a reader could take for a VMDK descriptor is refused for any requested format."""
    if expected in ("auto", "vmdk"):
        refuse(text, UnsafeImage, "only a descriptor. Its data is in other files", expected)
    else:
        refuse(text, UnknownFormat, f"The image is vmdk, but {expected} was asked for", expected)


def described(**fields: str) -> bytes:
    """Return a streamOptimized VMDK with another descriptor."""
    return stream_optimized(NOISE, descriptor=vmdk_descriptor(137, **fields))


def refooted(**fields: int | bytes) -> bytes:
    """Return a streamOptimized VMDK whose footer differs from its header."""
    image = stream_optimized(NOISE)
    return overlay(image, {len(image) - 1024: vmdk_header(**{"capacity": 137, "gd_offset": 200} | fields)})


@table(
    {
        "a parent": (described(parentCID="12345678"), UnsafeImage, "delta disk; its parent is unnamed"),
        "a named parent": (described(extra='parentFileNameHint="/vmfs/x"'), UnsafeImage, "its parent is '/vmfs/x'"),
        "two createTypes": (
            described(extra='createtype="monolithicFlat"'),
            UnsafeImage,
            "streamoptimized and monolithicflat",
        ),
        "no createType": (described(createType=""), UnsafeImage, "createType is missing"),
        "type monolithicFlat": (described(createType='"monolithicFlat"'), UnsafeImage, "is monolithicflat"),
        "type twoGbMaxExtentFlat": (described(createType='"twoGbMaxExtentFlat"'), UnsafeImage, "twogbmaxextentflat"),
        "type vmfs": (described(createType='"vmfs"'), UnsafeImage, "createType is vmfs"),
        "type seSparse": (described(createType='"seSparse"'), UnsafeImage, "createType is sesparse"),
        "a path": (described(extent='RW 137 SPARSE "/etc/passwd"'), UnsafeImage, "points outside itself.*/etc/passwd"),
        "a Windows path": (described(extent='RW 137 SPARSE "..\\x"'), UnsafeImage, "points outside itself"),
        "a flat extent": (described(extent='RW 137 FLAT "x" 0'), UnsafeImage, "points outside itself"),
        "two extents": (described(extra='RW 8 SPARSE "other.vmdk"'), UnsafeImage, "describes 2 extents"),
        "no extent": (described(extent=""), UnsafeImage, "describes 0 extents"),
        "an extent of another size": (described(extent='RW 9 SPARSE "x"'), CorruptImage, "its descriptor says 9"),
        "a line of no form": (described(extra="include /etc/passwd"), UnsafeImage, "line of no known form"),
        "not ASCII": (described(extra='x="é"'), UnsafeImage, "not ASCII"),
        "no descriptor": (stream_optimized(NOISE, descriptor_size=0), UnsafeImage, "does not hold its own"),
        "its descriptor elsewhere": (
            stream_optimized(NOISE, descriptor_offset=9),
            UnsafeImage,
            "does not hold its own",
        ),
        "version 9": (stream_optimized(NOISE, version=9), CorruptImage, "no VMDK header of version 1 to 3"),
        "a capacity of 2^60 sectors": (vmdk_header(capacity=1 << 60), CorruptImage, "capacity of 1152"),
        "no capacity": (vmdk_header(capacity=0), CorruptImage, "capacity of 0"),
        "grains of 3 sectors": (stream_optimized(NOISE, grain_size=3), CorruptImage, "grains of 3 sectors"),
        "empty grain tables": (stream_optimized(NOISE, gtes_per_gt=0), CorruptImage, "0 in a table"),
        "mangled newlines": (vmdk_header(capacity=8, newlines=b"\n\n\n\n"), CorruptImage, "text mode"),
        "a footer of another capacity": (refooted(capacity=9999), UnsafeImage, "contradicts its header: capacity"),
        "a footer of another descriptor": (refooted(descriptor_offset=7), UnsafeImage, "header: descriptor_offset"),
        "a footer that names a footer": (refooted(gd_offset=GD_AT_END), CorruptImage, "its grain directory is at"),
        "a footer of no kind": (refooted(magic=b"XXXX"), CorruptImage, "no VMDK header"),
    }
)
def test_vmdk(image: bytes, error: type[ImageError], text: str) -> None:
    """A VMDK whose descriptor, parent or footer refers to another file is refused."""
    refuse(image, error, text)


@table(
    {
        "VHD with a parent": (vhd_dynamic(parent="C:\\base.vhd"), UnsafeImage, "differencing disk; its parent is 'C:"),
        "VHD with a wrong checksum": (vhd_dynamic(checksum=1), CorruptImage, "wrong checksum"),
        "VHD of 3 TiB": (vhd_dynamic(3 << 40), CorruptImage, "says that it has 3298534883328 bytes"),
        "VHD of an unknown type": (vhd_dynamic(kind=9), CorruptImage, "footer of type 9"),
        "VHD with two different footers": (vhd_dynamic(end=vhd_footer(9 << 20, 3)), CorruptImage, "footers of the VHD"),
        "VHD without a dynamic header": (vhd_dynamic(dynamic_at=0), CorruptImage, "no dynamic header"),
        "fixed VHD with a wrong checksum": (vhd_fixed(bytes(4096), checksum=1), CorruptImage, "wrong checksum"),
        "dynamic VHD without its head": (bytes(4096) + vhd_footer(4096, 3), CorruptImage, "does not begin as one"),
        "VHDX flagged with a parent": (vhdx(flags=2), UnsafeImage, "VHDX is a differencing disk"),
        "VHDX with a parent locator": (vhdx(parent=True), UnsafeImage, "VHDX is a differencing disk"),
        "VHDX of 100 TiB": (vhdx(100 << 40), CorruptImage, "says that it has"),
        "VHDX with an unknown region": (vhdx(required=2), UnknownFormat, "needs an unknown region"),
        "VHDX with a region in its header": (vhdx(bat_at=4096), CorruptImage, "region at offset 4096"),
        "VHDX without regions": (overlay(vhdx(), {192 << 10: bytes(16)}), CorruptImage, "no valid region table"),
        "VHDX without metadata": (overlay(vhdx(), {1 << 20: bytes(16)}), CorruptImage, "no valid metadata table"),
    }
)
def test_vhd_and_vhdx(image: bytes, error: type[ImageError], text: str) -> None:
    """A differencing or contradictory VHD or VHDX is refused."""
    refuse(image, error, text)


def test_vhdx_of_qemu_with_a_parent(tmp_path: Path) -> None:
    """The parent flag is found in a VHDX of a real tool."""
    if not shutil.which("qemu-img"):
        missing("qemu-img", "install qemu-utils")
    subprocess.run(["qemu-img", "create", "-q", "-f", "vhdx", "x", "8M"], cwd=tmp_path, check=True)
    image = (tmp_path / "x").read_bytes()
    metadata = image.index(b"metadata", 1 << 20)
    flags = metadata + 65536 + 4
    assert inspect(image).format == "vhdx"
    refuse(overlay(image, {flags: bytes([image[flags] | 2])}), UnsafeImage, "differencing")


HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>"


@pytest.mark.parametrize("expected", ["auto", "raw"])
@table(
    {
        "nothing": (b"", UnknownFormat, "The image is empty"),
        "HTML": (HTML, UnknownFormat, "The server sent HTML"),
        "HTML behind blanks and a BOM": (b"\xef\xbb\xbf \r\n<HTML>", UnknownFormat, "The server sent HTML"),
        "an S3 error": (b'<?xml version="1.0"?><Error>', UnknownFormat, "HTML or XML"),
        "gzip": (b"\x1f\x8b\x08" + NOISE, UnknownFormat, "a gzip archive.*Unpack it"),
        "bzip2": (b"BZh91AY&SY" + NOISE, UnknownFormat, "a bzip2 archive"),
        "xz": (b"\xfd7zXZ\0" + NOISE, UnknownFormat, "an xz archive"),
        "zstandard": (b"\x28\xb5\x2f\xfd" + NOISE, UnknownFormat, "a zstandard archive"),
        "zip": (b"PK\x03\x04" + NOISE, UnknownFormat, "a zip archive"),
        "an OVA": (b"disk.ovf".ljust(257, b"\0") + b"ustar\x0000", UnknownFormat, "a tar archive"),
        "ESX sparse": (b"COWD" + NOISE, UnknownFormat, "COWD"),
        "SE sparse": (b"\xbe\xba\xfe\xca\0\0\0\0" + NOISE, UnknownFormat, "SE sparse"),
        "QED": (b"QED\0" + NOISE, UnknownFormat, "a QED image"),
        "VDI": (bytes(64) + b"\x7f\x10\xda\xbe" + NOISE, UnknownFormat, "a VDI image"),
        "Parallels": (b"WithoutFreeSpace" + NOISE, UnknownFormat, "a Parallels image"),
        "Parallels, extended": (b"WithouFreSpacExt" + NOISE, UnknownFormat, "a Parallels image"),
        "LUKS": (b"LUKS\xba\xbe\0\x02" + NOISE, UnknownFormat, r"an encrypted disk \(LUKS\)"),
        "one byte": (b"\xff", UnknownFormat, "1 bytes are no disk image"),
        "511 bytes": (b"\xff" * 511, UnknownFormat, "511 bytes are no disk image"),
        "a disk and a half sector": (bytes(4096) + b"\xff" * 100, UnknownFormat, "4196 bytes are no disk image"),
    }
)
def test_no_image(image: bytes, error: type[ImageError], text: str, expected: str) -> None:
    """The error of an answer that is no image names its kind, even for a request of raw."""
    refuse(image, error, text, expected)


def test_text() -> None:
    """Text is refused with its first words, unless the request says raw."""
    page = b"Service temporarily unavailable.\n" * 512
    refuse(page, UnknownFormat, "text, not an image: 'Service temporarily unavailable")
    assert inspect(page, "raw").format == "raw"


@pytest.mark.parametrize(
    "image",
    [qcow2(), stream_optimized(NOISE), vhd_dynamic(), vhd_fixed(bytes(4096)), vhdx(), iso()],
    ids=["qcow2", "vmdk", "vhd", "fixed vhd", "vhdx", "iso"],
)
def test_hidden_in_raw(image: bytes) -> None:
    """An image of another format is refused for a request of raw, because some readers probe it."""
    refuse(image, UnknownFormat, "but raw was asked for", "raw")


def test_second_opinion() -> None:
    """An image that only the second inspector recognises is refused too."""
    refuse(b"x=1\n" * 2000 + b'createType="monolithicFlat"\n', AmbiguousFormat, "raw and vmdk at once", "raw")


def test_raised_early() -> None:
    """The result is known after little more than the first MiB, not at the end of the download."""
    inspection = Inspection("qcow2")
    inspection(gpt(4 << 20)[: 1 << 20])
    with pytest.raises(UnknownFormat, match="The image is raw"):
        inspection(bytes(1 << 20))


def test_formats_are_told_apart() -> None:
    """All formats of the list have different names, and none matches an empty head."""
    assert len({each.name for each in FORMATS}) == len(FORMATS)
    assert not [each.name for each in FORMATS if each.matches(b"")]
