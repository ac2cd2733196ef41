"""xz streams of many blocks: parallel unpacking gives the same results as serial unpacking."""

from __future__ import annotations

import functools
import lzma
import os
import random
import shutil
import subprocess
import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssvm_worker.errors import CorruptImage, ImageError
from ssvm_worker.units import MiB
from ssvm_worker.unpacking import unwrap
from tests.neighbours import missing

NOISE = random.Random(10).randbytes(150_000)
DISK = NOISE + bytes(MiB) + NOISE


def packed(data: bytes, options: str = "--block-size=100KiB") -> bytes:
    """Return the xz output of several threads."""
    if not shutil.which("xz"):
        missing("xz", "install xz-utils")
    command = ["xz", "-0", "-T2", *options.split(), "-c"]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def opened(data: bytes, step: int = MiB) -> bytes:
    name, inside = unwrap((data[at : at + step] for at in range(0, len(data), step)), "a file")
    assert name == "xz"
    return b"".join(inside)


@pytest.mark.parametrize("check", ["none", "crc32", "crc64", "sha256"])
@pytest.mark.parametrize("step", [1000, MiB])
def test_unpacks(check: str, step: int) -> None:
    """Blocks are written in their order, for any check and any chunk size."""
    data = packed(DISK, f"--block-size=100KiB --check={check}")
    assert opened(data, step) == DISK


def test_one_after_the_other() -> None:
    """A stream whose blocks lack sizes, or are too large for memory, is unpacked serially."""
    assert opened(lzma.compress(DISK)) == DISK
    assert opened(packed(bytes(160 * MiB), "--block-size=160MiB")) == bytes(160 * MiB)
    assert opened(packed(bytes(41 * MiB), "--block-list=1MiB,40MiB")) == bytes(41 * MiB)


def test_a_size_that_does_not_end() -> None:
    """A number of more than nine bytes in a block header is damage in every code path."""
    head = packed(DISK)[:12] + b"\x08\xc0" + b"\xff" * 40
    with pytest.raises(CorruptImage):
        opened(head)


def test_several_streams() -> None:
    """Streams of both kinds may follow each other, with zeros between them."""
    assert opened(packed(DISK) + bytes(8) + lzma.compress(NOISE) + packed(DISK) + bytes(4)) == DISK + NOISE + DISK


def test_cut_short() -> None:
    """A truncated stream is refused, also in its index and footer."""
    whole = packed(DISK)
    for size in (len(whole) - 1, len(whole) - 13, len(whole) - 40, len(whole) // 2, 40):
        with pytest.raises(CorruptImage, match="cut short"):
            opened(whole[:size])


def test_junk_behind() -> None:
    """Bytes other than zeros after the end are refused."""
    with pytest.raises(CorruptImage, match="other data follows its 1 members"):
        opened(packed(DISK) + b"junk" * 10)


@given(data=st.data())
@settings(max_examples=60)
def test_damaged(data: st.DataObject) -> None:
    """One wrong bit in a block, its check, the index or the footer is detected."""
    whole = bytearray(small())
    at = data.draw(st.integers(6, len(whole) - 1) | st.integers(len(whole) - 60, len(whole) - 1))  # after the magic
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ImageError):
        opened(bytes(whole))


@functools.cache
def small() -> bytes:
    """Return a stream of five blocks."""
    return packed(NOISE[:20_000] * 2, "--block-size=8KiB")


def test_blocks_left_out() -> None:
    """The index reveals a missing block."""
    one, two = packed(NOISE[:1000], "--block-size=1000"), packed(NOISE[:2000], "--block-size=1000")
    cut = two[:12] + two[12 + (len(two) - len(one)) :]
    with pytest.raises(CorruptImage):
        opened(cut)


def test_memory_and_threads() -> None:
    """Memory does not grow with the stream, and no thread is left."""
    data, before = packed(bytes(60 * MiB), "--block-size=2MiB"), _threads_of_liblzma()
    tracemalloc.start()
    size = sum(len(each) for each in unwrap([data], "")[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 60 * MiB
    assert peak < 16 * MiB
    inside = unwrap([data], "")[1]
    next(inside)
    del inside
    assert _threads_of_liblzma() <= before


def _threads_of_liblzma() -> set[str]:
    """Return the threads of this process that Python does not know."""
    return set(os.listdir("/proc/self/task")) - {str(each.native_id) for each in threading.enumerate()}
