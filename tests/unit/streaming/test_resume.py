"""A broken source resumes where it broke, unnoticed by its consumer."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker.artifacts.checksums import Hasher, digest_of
from ssvm_worker.errors import SourceChanged, SourceUnavailable
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import WORTH_IT, Resuming, read_bytes, store_stream

ME = Owner("job", 1)
DATA = bytes(range(256)) * 40


class Cutting:
    """A source that breaks once at each of the given offsets."""

    name = "cutting"

    def __init__(self, data: bytes, cuts: Iterable[int], step: int = 7, resumable: bool = True) -> None:
        self.size: int | None = len(data)
        self.resumable = resumable
        self.opened: list[int] = []
        self._data, self._cuts, self._step = data, sorted(cuts), step

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        self.opened.append(offset)
        end = self._cuts.pop(0) if self._cuts else None
        stop = len(self._data) if end is None else max(offset, end)
        for start in range(offset, stop, self._step):
            yield self._data[start : min(start + self._step, stop)]
        if end is not None:
            raise SourceUnavailable("cut", self.name)


def resuming(source: Cutting, **more: int) -> Resuming:
    """Return the chunks of a source that resumes without waits."""
    return Resuming(source, lambda _: None, **more)


@given(
    st.binary(min_size=1, max_size=300),
    st.lists(st.integers(0, 300), max_size=5, unique=True),
    st.integers(1, 50),
    st.integers(0, 300),
)
def test_resuming_is_no_failure(data: bytes, cuts: list[int], step: int, offset: int) -> None:
    """Each byte arrives once and in order, for any break and any start."""
    offset = min(offset, len(data))
    it = resuming(Cutting(data, [min(cut, len(data)) for cut in cuts], step), offset=offset, tries=5)
    assert b"".join(it) == data[offset:]


def test_resumptions_are_counted() -> None:
    """A resumption inside the stream counts, and a restart at the first byte does not."""
    it = resuming(Cutting(DATA, [0, 100, 200]))
    assert (b"".join(it), it.resumptions) == (DATA, 2)


def test_tries_start_anew_when_enough_has_come() -> None:
    """A source that breaks often but sends enough between the breaks is not given up."""
    data = bytes(WORTH_IT) * 5
    source = Cutting(data, range(WORTH_IT, len(data), WORTH_IT), step=WORTH_IT)
    assert b"".join(resuming(source, tries=1)) == data
    assert len(source.opened) == 5


def test_tries_end_though_a_little_comes() -> None:
    """A source that sends only a little per try is given up, so it cannot hold the job forever."""
    source = Cutting(DATA, range(100, 5000, 100))
    with pytest.raises(SourceUnavailable):
        list(resuming(source, tries=3))
    assert source.opened == [0, 100, 200, 300]


def test_tries_end() -> None:
    """A source that sends nothing is given up after the last try."""
    source = Cutting(DATA, [100] * 20)
    with pytest.raises(SourceUnavailable):
        list(resuming(source, tries=3))
    assert source.opened == [0, 100, 100, 100]


def test_not_resumable_source() -> None:
    """A source that cannot resume is tried again only before its first byte."""
    assert b"".join(resuming(Cutting(DATA, [0, 0], resumable=False))) == DATA
    with pytest.raises(SourceUnavailable):
        list(resuming(Cutting(DATA, [0, 100], resumable=False)))


def test_changed_source_is_no_break() -> None:
    """A changed source is not tried again."""

    class Changing(Cutting):
        def open(self, offset: int = 0) -> Generator[bytes, None, None]:
            if offset:
                raise SourceChanged("another")
            yield from super().open(offset)

    with pytest.raises(SourceChanged):
        list(resuming(Changing(DATA, [100])))


def test_waits_grow_and_can_be_cancelled() -> None:
    """Waits double up to half a minute, and the caller's cancel ends them."""
    waits: list[float] = []
    with pytest.raises(SourceUnavailable):
        list(Resuming(Cutting(DATA, [0] * 20), waits.append, tries=7))
    assert waits == [1, 2, 4, 8, 16, 30, 30]


@given(st.lists(st.integers(1, len(DATA) - 1), max_size=5), st.integers(500, 3000))
def test_digest_is_independent_of_breaks(cuts: list[int], step: int) -> None:
    """A stream with breaks has the same content, digest and size as one without."""
    store, hasher = MemoryStore(), Hasher()
    store_stream(resuming(Cutting(DATA, cuts, step)), {"memory": store.writer("image", owner=ME)}, [hasher])
    assert (digest_of(read_bytes(store, "image")), hasher.size) == (hasher.digest(), len(DATA))
    assert hasher.digest() == digest_of(DATA)
