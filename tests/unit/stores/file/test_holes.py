"""Zeros become holes in files, and every byte reads as it was written."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssvm_worker.stores.file.part_file import HOLE
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import CHUNK, Owner
from ssvm_worker.streaming.pipeline import read_bytes
from tests.contracts.store import ME

NOISE = random.Random(3).randbytes(HOLE)


def store(root: Path, *chunks: bytes) -> tuple[bytes, int]:
    """Store these chunks, and return what is read back, and the bytes of disk that the file uses."""
    where = FileStore("local", root)
    with where.writer("image", owner=ME) as sink:
        for chunk in chunks:
            sink.write(chunk)
        sink.commit()
    return read_bytes(where, "image", 1 << 30), (root / "image").stat().st_blocks * 512


@pytest.mark.parametrize(
    ("chunks", "taken"),
    [
        pytest.param([NOISE, bytes(CHUNK), NOISE], 2 * HOLE, id="zeros between data"),
        pytest.param([bytes(CHUNK)], 0, id="zeros alone"),
        pytest.param([NOISE + bytes(CHUNK - HOLE)], HOLE, id="zeros at the end"),
        pytest.param([bytes(CHUNK), NOISE], HOLE, id="zeros at the start"),
        pytest.param([NOISE, *[bytes(4096)] * 256, NOISE], 2 * HOLE, id="zeros in small chunks"),
        pytest.param([NOISE, bytes(HOLE - 4096), NOISE], 3 * HOLE - 4096, id="too few zeros"),
    ],
)
def test_zeros_take_no_room(tmp_path: Path, chunks: list[bytes], taken: int) -> None:
    """At least 64 KiB of zeros use no disk space, and the object reads as it was written."""
    data, blocks = store(tmp_path, *chunks)
    assert data == b"".join(chunks)
    assert blocks == taken


@given(pieces=st.lists(st.tuples(st.booleans(), st.integers(1, 3 * HOLE)), max_size=8), cuts=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_is_lost(tmp_path: Path, pieces: list[tuple[bool, int]], cuts: st.DataObject) -> None:
    """For any position of zeros and any size of chunks, the object reads as it was written."""
    whole = b"".join(bytes(size) if zero else (NOISE * 3)[:size] for zero, size in pieces)
    places = sorted({0, len(whole), *cuts.draw(st.lists(st.integers(0, len(whole)), max_size=8))})
    chunks = [whole[start:end] for start, end in itertools.pairwise(places)]
    assert store(tmp_path, *chunks)[0] == whole


def test_suspended_in_zeros(tmp_path: Path) -> None:
    """A part that ends with zeros has its full length for the next attempt."""
    where = FileStore("local", tmp_path)
    with where.writer("image", owner=ME) as sink:
        sink.write(NOISE + bytes(CHUNK - HOLE))
        sink.suspend()
    with where.writer("image", owner=Owner(ME.job_id, 2), resume=True) as sink:
        assert sink.offset == CHUNK
        sink.write(NOISE)
        sink.commit()
    assert read_bytes(where, "image") == NOISE + bytes(CHUNK - HOLE) + NOISE
