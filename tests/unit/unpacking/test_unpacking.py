"""A compressed image is unpacked in the same pass, completely or not at all."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssvm_worker import unpacking
from ssvm_worker.errors import CorruptImage, ImageError, TooLarge, UnknownFormat, UnsafeImage, WorkerError
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.units import MiB
from ssvm_worker.unpacking import recognise, refuse_bomb, unwrap
from tests.archives import COMPRESS, tar_member, tar_of, xz_with_dictionary, zip_of, zstd_with_window

NOISE = random.Random(2).randbytes(100_000)
DISK = NOISE + bytes(MiB) + NOISE
each_kind = pytest.mark.parametrize("kind", COMPRESS)


def opened(data: bytes, step: int = CHUNK) -> tuple[str, bytes]:
    """Return the compression and the content of bytes that arrive in chunks of one size."""
    name, inside = unwrap((data[at : at + step] for at in range(0, len(data), step)), "a file")
    return name, b"".join(inside)


def refuse(data: bytes, error: type[WorkerError], text: str) -> None:
    with pytest.raises(error, match=text):
        opened(data)


@pytest.mark.parametrize("step", [1, 511, 65536, CHUNK])
@each_kind
def test_unwraps(kind: str, step: int) -> None:
    """Any size of chunks gives the same content, in chunks of the usual size."""
    small = DISK if step > 1 else DISK[:4000]
    assert opened(COMPRESS[kind](small), step) == (kind, small)
    assert all(len(each) <= CHUNK for each in unwrap([COMPRESS[kind](small)], "")[1])


def test_nothing_wrapped() -> None:
    """Uncompressed bytes pass unchanged."""
    assert opened(DISK) == ("", DISK)
    assert opened(b"") == ("", b"")


@each_kind
def test_several_members(kind: str) -> None:
    """Several members form one stream, as `cat` and parallel compressors write them."""
    assert opened(COMPRESS[kind](NOISE) + COMPRESS[kind](b"") + COMPRESS[kind](b"end"))[1] == NOISE + b"end"


@each_kind
def test_zeros_behind(kind: str) -> None:
    """Zeros after the end are padding."""
    assert opened(COMPRESS[kind](NOISE) + bytes(100_000))[1] == NOISE


@each_kind
def test_cut_short(kind: str) -> None:
    """A truncated stream is refused, also if only its last bytes are missing."""
    whole = COMPRESS[kind](NOISE)
    for size in (len(whole) - 1, len(whole) - 4, len(whole) // 2, 20):
        refuse(whole[:size], CorruptImage, "cut short")


@each_kind
def test_junk_behind(kind: str) -> None:
    """Bytes other than zeros after the end are refused, because another reader might start there."""
    refuse(COMPRESS[kind](NOISE) + b"junk" * 100, CorruptImage, "other data follows its 1 members")


@each_kind
def test_damaged(kind: str) -> None:
    """One flipped bit in the data or in its checksum is detected."""
    whole = COMPRESS[kind](NOISE)
    for at in (len(whole) // 2, len(whole) - (6 if kind == "gzip" else 2)):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        refuse(bytes(damaged), CorruptImage, "damaged|cut short")


@pytest.mark.parametrize("outer", [*COMPRESS, "zip"])
@pytest.mark.parametrize("inner", [*COMPRESS, "zip", "tar"])
def test_nested(outer: str, inner: str) -> None:
    """One compression is removed, and a second one is refused by its name."""
    wrap = COMPRESS | {"zip": zip_of, "tar": lambda data: tar_of(tar_member("disk.raw", data))}
    refuse(wrap[outer](wrap[inner](NOISE)), UnknownFormat, f"There is an? {inner} file inside the {outer} file")


@pytest.mark.parametrize(
    "data",
    [xz_with_dictionary(1 << 32), xz_with_dictionary(256 * MiB), zstd_with_window(31), zstd_with_window(28)],
    ids=["xz of 4 GiB", "xz of 256 MiB", "zstandard of 2 GiB", "zstandard of 256 MiB"],
)
def test_memory(data: bytes) -> None:
    """A stream that needs more memory than allowed is refused before any allocation."""
    refuse(data, TooLarge, "needs more memory")


def test_what_the_tools_need() -> None:
    """The largest windows of the tools' own presets are accepted."""
    assert opened(xz_with_dictionary(64 * MiB))[1] == b"x" * 100
    assert opened(zstd_with_window(27))[1] == b""


@each_kind
def test_memory_of_a_bomb(kind: str) -> None:
    """Memory does not grow with the output, and a bomb stops after the allowed bytes."""
    bomb = COMPRESS[kind](bytes(24 * MiB))
    tracemalloc.start()
    taken = sum(len(each) for each in unwrap([bomb], "")[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken == 24 * MiB
    assert peak < 6 * MiB


def test_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio above the limit is a bomb, once the output is large enough to matter."""
    monkeypatch.setattr(unpacking, "UNSUSPICIOUS", 4 * MiB)
    bomb = COMPRESS["zstandard"](bytes(64 * MiB))
    with pytest.raises(TooLarge, match="more than 250 times as many"):
        list(refuse_bomb(unwrap([bomb], "")[1], lambda: len(bomb), 250, "a file"))
    assert sum(map(len, refuse_bomb(unwrap([bomb], "")[1], lambda: len(bomb), 65536, ""))) == 64 * MiB


@pytest.mark.parametrize("streamed", [False, True], ids=["sizes before", "sizes behind"])
@pytest.mark.parametrize("step", [1, 4000, CHUNK])
def test_zip(step: int, streamed: bool) -> None:
    """The only member of a zip archive is the image, wherever its sizes are stored."""
    small = DISK if step > 1 else DISK[:4000]
    assert opened(zip_of(small, streamed=streamed), step) == ("zip", small)


class Pipe(io.RawIOBase):
    """A writer that cannot seek."""

    def __init__(self) -> None:
        self.taken = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.taken += bytes(data)
        return len(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("zip64", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("piped", [False, True], ids=["to a file", "to a pipe"])
def test_zip_by_python(piped: bool, zip64: bool, method: int) -> None:
    """Every form of Python's zip files is read, except a stored member in a pipe, which has no known end."""
    out: Any = Pipe() if piped else io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive, archive.open("disk.raw", "w", force_zip64=zip64) as member:
        member.write(NOISE)
    data = out.taken if piped else out.getvalue()
    if piped and method == zipfile.ZIP_STORED:
        refuse(data, UnknownFormat, "which is not supported")
    else:
        assert opened(data) == ("zip", NOISE)


def test_zip64_end() -> None:
    """The end records of zip64 are accepted."""
    plain = zip_of(NOISE)
    end64 = b"PK\x06\x06" + struct.pack("<Q", 44) + bytes(44)
    locator = b"PK\x06\x07" + bytes(16)
    assert opened(plain[:-22] + end64 + locator + plain[-22:])[1] == NOISE
    lying = b"PK\x06\x06" + struct.pack("<Q", 1 << 63) + bytes(44)
    refuse(plain[:-22] + lying + plain[-22:], CorruptImage, "cut short")


BAD_ZIPS = {
    "no member": (b"PK\x05\x06" + bytes(18), UnknownFormat, "is empty"),
    "two members": (zip_of(b"a", more=zip_of(b"b")), UnknownFormat, "more than one member"),
    "two in the directory": (zip_of(b"a", more=zip_of(b"a")[-76:-22]), UnknownFormat, "more than one member"),
    "a directory": (zip_of(b"", b"images/"), UnknownFormat, "contains a directory"),
    "a name with ..": (zip_of(NOISE, b"../../etc/passwd"), UnsafeImage, "points outside"),
    "a name with .. in Windows' way": (zip_of(NOISE, b"..\\x"), UnsafeImage, "points outside"),
    "an absolute name": (zip_of(NOISE, b"/etc/passwd"), UnsafeImage, "points outside"),
    "a drive": (zip_of(NOISE, b"C:\\x"), UnsafeImage, "points outside"),
    "a NUL in its name": (zip_of(NOISE, b"a\0b"), UnsafeImage, "points outside"),
    "encryption": (zip_of(NOISE, local={"flags": 1}), UnsafeImage, "encrypted"),
    "an encrypted directory": (zip_of(NOISE, entry={"flags": 1 << 13}), UnsafeImage, "contradicts"),
    "a method of its own": (zip_of(NOISE, local={"method": 14}), UnknownFormat, "method 14"),
    "a wrong CRC": (zip_of(NOISE, local={"crc": 1}), CorruptImage, "its header says"),
    "a wrong CRC in the directory": (zip_of(NOISE, entry={"crc": 1}), UnsafeImage, "contradicts"),
    "a size that lies": (zip_of(NOISE, local={"size": 5}), CorruptImage, "its header says"),
    "a descriptor that lies": (
        zip_of(NOISE, streamed=True).replace(b"PK\x07\x08", b"PK\x07\x08\1"),
        CorruptImage,
        "its header says",
    ),
    "a directory entry elsewhere": (zip_of(NOISE, entry={"offset": 40}), UnsafeImage, "contradicts"),
    "bytes behind its end": (zip_of(NOISE) + b"x", UnsafeImage, "data follows it"),
    "bytes before its directory": (zip_of(NOISE, more=b"x" * 50), UnsafeImage, "contradicts"),
    "no directory": (zip_of(NOISE)[:-80], CorruptImage, "cut short"),
    "half a member": (zip_of(NOISE)[:1000], CorruptImage, "cut short"),
    "a damaged member": (
        zip_of(NOISE)[:38] + b"\xff\xff" + zip_of(NOISE)[40:],
        CorruptImage,
        "damaged|its header says",
    ),
}


@pytest.mark.parametrize(("data", "error", "text"), BAD_ZIPS.values(), ids=BAD_ZIPS.keys())
def test_bad_zip(data: bytes, error: type[WorkerError], text: str) -> None:
    """A zip archive is refused unless its header and its directory both describe exactly one plain member."""
    refuse(data, error, text)


SMALL = [*(wrap(NOISE[:5000]) for wrap in COMPRESS.values()), zip_of(NOISE[:5000])]


def _mutations(data: st.DataObject) -> Iterator[bytes]:
    whole = data.draw(st.sampled_from(SMALL))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    yield bytes(damaged[: data.draw(st.integers(0, len(whole)))])
    yield bytes(damaged)


@given(data=st.data())
@settings(max_examples=100)
def test_no_crash(data: st.DataObject) -> None:
    """Any bytes are unpacked or refused with a reason, and the output is at most twice the input."""
    for damaged in _mutations(data):
        try:
            name, inside = opened(damaged)
        except ImageError:
            continue
        assert name != "zip" or inside == NOISE[:5000]
        assert len(inside) <= len(damaged) * 2


def test_recognised_by_content(tmp_path: Path) -> None:
    """A raw disk is not mistaken for a compressed one, because each magic has at least three bytes."""
    assert [recognise(each) for each in (b"\x1f\x8b\x07", b"BZh1xx", b"PK\1\2", b"\x50\x2a\x4d", b"")] == [""] * 5
