"""Tar archives: plain files are read from the stream, all other members are refused."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssvm_worker.errors import CorruptImage, ImageError, UnsafeImage, WorkerError
from ssvm_worker.unpacking import recognise
from ssvm_worker.unpacking.exact_reader import ExactReader
from ssvm_worker.unpacking.tar import members
from tests.archives import tar_by_library, tar_member, tar_of

NOISE = random.Random(4).randbytes(5000)
FILES = {"disk.ovf": b"<x/>", "a" * 120 + ".vmdk": NOISE, "größe.mf": b"", "4.iso": NOISE[:512]}
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(data: bytes, step: int = 1 << 20) -> dict[str, bytes]:
    """Return every member's bytes, of an archive that arrives in chunks of one size."""
    chunks = (data[at : at + step] for at in range(0, len(data), step))
    return {each.name: b"".join(each.chunks) for each in members(ExactReader(chunks), "an archive")}


@pytest.mark.parametrize("step", [1, 700, 1 << 20])
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_reads(form: str, step: int) -> None:
    """The names and bytes of all members are read, with long names and any chunk size."""
    data = tar_by_library(FILES, FORMS[form])
    assert recognise(data[:512]) == "tar"
    assert read(data, step) == FILES


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_reads_what_tar_makes(tmp_path: Path, form: str) -> None:
    """Every format of GNU tar is recognised and read, also the one without a magic."""
    files = {"b.ovf": NOISE, "b.vmdk": NOISE * 100}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    made = subprocess.run(["tar", f"--format={form}", "-c", "./b.ovf", "b.vmdk"], cwd=tmp_path, capture_output=True)
    assert recognise(made.stdout[:512]) == "tar"
    assert read(made.stdout) == files


def numbered(count: int) -> bytes:
    return b"".join(tar_member(f"f{each}") for each in range(count))


def resized(field: bytes) -> bytes:
    """Return a member with this size field."""
    block = bytearray(tar_member("x"))
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


BAD = {
    "a symbolic link": (tar_member("x", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), UnsafeImage, "symbolic link"),
    "a hard link": (tar_member("x", kind=tarfile.LNKTYPE, linkname="y"), UnsafeImage, "hard link"),
    "a device": (tar_member("x", kind=tarfile.BLKTYPE), UnsafeImage, "block device"),
    "a pipe": (tar_member("x", kind=tarfile.FIFOTYPE), UnsafeImage, "a pipe"),
    "a directory": (tar_member("x", kind=tarfile.DIRTYPE), UnsafeImage, "a directory"),
    "a sparse file": (tar_member("x", kind=tarfile.GNUTYPE_SPARSE), UnsafeImage, "a sparse file"),
    "a sparse file of pax": (
        tar_member("x", NOISE, pax_headers={"GNU.sparse.size": "8796093022208"}),
        UnsafeImage,
        "a sparse file",
    ),
    "a type of its own": (tar_member("x", kind=b"Q"), UnsafeImage, "a member of type b'Q'"),
    "an absolute name": (tar_member("/etc/passwd", NOISE), UnsafeImage, "with a path: '/etc/passwd'"),
    "a name with ..": (tar_member("../x", NOISE), UnsafeImage, "with a path"),
    "a name in a directory": (tar_member("a/x", NOISE), UnsafeImage, "with a path"),
    "a name in Windows' way": (tar_member("a\\x", NOISE), UnsafeImage, "with a path"),
    "a pax name with ..": (tar_member("x", NOISE, pax_headers={"path": "../x"}), UnsafeImage, "with a path"),
    "control characters": (tar_member("x\x1b[2J", NOISE), UnsafeImage, r"with a path: 'x\\x1b"),
    "a name twice": (tar_member("x") + tar_member("./X"), UnsafeImage, "two members named 'X'"),
    "thousands of members": (numbered(300), UnsafeImage, "more than 256 members"),
    "a pax bomb": (tar_member("x", pax_headers={"comment": "y" * 70_000}), UnsafeImage, "oversized header"),
    "pax headers without end": (
        tar_member("x", b"6 a=b\n", kind=tarfile.XHDTYPE) * 9,
        UnsafeImage,
        "oversized header",
    ),
    "a damaged pax header": (tar_member("x", b"99 a=b\n", kind=tarfile.XHDTYPE), CorruptImage, "damaged pax"),
    "a pax size below zero": (tar_member("x", pax_headers={"size": "-5"}), CorruptImage, "of size b'-5'"),
    "a size below zero": (resized(b"\xff" * 12), CorruptImage, "of size"),
    "a size of 2^80": (resized(b"\x80\0" + struct.pack(">HQ", 1, 0)), CorruptImage, "of size"),
    "a size of letters": (resized(b"0000000000x\0"), CorruptImage, "of size"),
    "a wrong checksum": (tar_member("x", NOISE) + b"x" * 512, CorruptImage, "wrong checksum"),
}


@pytest.mark.parametrize(("data", "error", "text"), BAD.values(), ids=BAD.keys())
def test_refused(data: bytes, error: type[WorkerError], text: str) -> None:
    """A member that is not a plain file, has a path, or is too expensive to read is refused."""
    with pytest.raises(error, match=text):
        read(data + bytes(1024))


def test_cut_short() -> None:
    """An archive that is cut at any point is refused."""
    whole = tar_of(tar_member("x", NOISE), tar_member("y", NOISE))
    for size in (100, 700, len(whole) - 1024, len(whole) - 1025):
        with pytest.raises(CorruptImage, match="cut short"):
            read(whole[:size])


@pytest.mark.parametrize("names", [["x"], ["._x", "x"], ["vm.ovf", "disk", "vm.mf"], ["vm.ovf", "VM.MF", "disk"]])
def test_no_blocks_at_the_end(names: list[str]) -> None:
    """An archive with one member or a checksum file may lack zero blocks, but not bytes of its last member."""
    data = b"".join(tar_member(name, NOISE) for name in names)
    assert read(data) == {name: NOISE for name in names if not name.startswith("._")}
    for missing in (1, 512, 700):
        with pytest.raises(CorruptImage, match="cut short"):
            read(data[:-missing])


def test_apple_double() -> None:
    """The extra files of macOS's tar are left out."""
    assert read(tar_of(tar_member("._x", b"\0\5\x16\7"), tar_member("x", NOISE))) == {"x": NOISE}


def test_behind_the_end() -> None:
    """Zeros may follow the end, but no other bytes."""
    whole = tar_of(tar_member("x", NOISE))
    assert read(whole + bytes(9000)) == {"x": NOISE}
    with pytest.raises(CorruptImage, match="follows the end"):
        read(whole + tar_member("y", NOISE))


@given(data=st.data())
@settings(max_examples=200)
def test_no_crash(data: st.DataObject) -> None:
    """Any archive is read, or refused with a reason."""
    whole = bytearray(tar_by_library(FILES, FORMS[data.draw(st.sampled_from(["gnu", "pax"]))]))
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert len(read(bytes(whole))) <= 256
