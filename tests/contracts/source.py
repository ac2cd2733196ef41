"""What every source promises. A new source's test file gives two fixtures, and gets all of this.

class TestOurSource(SourceContract):
    not_found = SourceNotFound

    @pytest.fixture
    def source(self) -> Source: ...         # of the bytes DATA, resumable

    @pytest.fixture
    def missing(self) -> Source: ...        # of nothing
"""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from ssvm_worker.errors import SourceNotFound, WorkerError
from ssvm_worker.streaming.interfaces import CHUNK, Source

#: Random, so that misplaced bytes are detected; more than two chunks, and no multiple of a size.
DATA = random.Random(4).randbytes(2 * CHUNK + 54_321)


def gather(source: Source, offset: int = 0) -> bytes:
    """Return all bytes from *offset*."""
    return b"".join(source.open(offset))


class SourceContract:
    not_found: type[WorkerError] = SourceNotFound

    def test_whole(self, source: Source) -> None:
        """The chunks together are the object, and its size is known at the end."""
        assert gather(source) == DATA
        assert source.size == len(DATA)

    def test_chunks(self, source: Source) -> None:
        """A chunk is bytes, never empty and never larger than CHUNK."""
        chunks = list(source.open())
        assert {type(each) for each in chunks} == {bytes}
        assert all(0 < len(each) <= CHUNK for each in chunks)

    def test_size_with_the_first_chunk(self, source: Source) -> None:
        """Size and resumability are known after the first chunk."""
        with closing(source.open()) as chunks:
            next(chunks)
            assert (source.size, source.resumable) == (len(DATA), True)

    @pytest.mark.parametrize(
        "offset",
        [
            pytest.param(1, id="the second byte"),
            pytest.param(CHUNK - 1, id="just before a chunk's end"),
            pytest.param(CHUNK, id="a chunk's end"),
            pytest.param(CHUNK + 1, id="just behind a chunk's end"),
            pytest.param(len(DATA) - 1, id="the last byte"),
            pytest.param(len(DATA), id="behind the last byte"),
        ],
    )
    def test_offset(self, source: Source, offset: int) -> None:
        """After a first open, an open at an offset gives exactly the rest."""
        with closing(source.open()) as chunks:
            next(chunks)
        assert gather(source, offset) == DATA[offset:]

    def test_opened_twice(self, source: Source) -> None:
        """A source that was closed in the middle gives all bytes again from the start."""
        with closing(source.open()) as chunks:
            next(chunks)
        assert gather(source) == DATA

    def test_missing(self, missing: Source) -> None:
        """A missing object is an error at the first chunk, not an empty object."""
        with pytest.raises(self.not_found):
            gather(missing)
