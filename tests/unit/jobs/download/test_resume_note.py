"""The journal of a transfer: written in time, never more than is on disk, and nothing after the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.jobs.download.image import ResumeNote
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Sink
from tests.contracts.store import BIG, ME, fill
from tests.waiting import until


def failing(sink: Sink, noted: list[int], leave: Callable[[], None]) -> None:
    """A transfer that fails at its end."""
    with ResumeNote(sink, noted.append):
        fill(sink, BIG)
        leave()
        raise KeyError


def test_notes_while_bytes_come(tmp_path: Path) -> None:
    """Flushed bytes are noted while the transfer runs."""
    noted: list[int] = []
    with FileStore("primary", tmp_path).writer("object", owner=ME) as sink, ResumeNote(sink, noted.append):
        fill(sink, BIG)
        until(lambda: noted[-1:] == [len(BIG)], "it is noted")
        sink.commit()
    assert noted == sorted(set(noted))


def test_last_note_of_what_was_suspended() -> None:
    """A transfer that fails and is kept is noted completely, even if it was short."""
    noted: list[int] = []
    sink = MemoryStore().writer("object", owner=ME)
    with pytest.raises(KeyError):
        failing(sink, noted, sink.suspend)
    assert noted == [len(BIG)]


def test_no_note_of_what_is_gone(tmp_path: Path) -> None:
    """A transfer that fails permanently is not noted."""
    noted: list[int] = []
    sink = FileStore("primary", tmp_path).writer("object", owner=ME)
    with pytest.raises(KeyError):
        failing(sink, noted, sink.abort)
    assert noted == []


def test_a_note_that_cannot_be_written(tmp_path: Path) -> None:
    """A failed note does not fail the transfer, and the draft keeps its content."""
    tries: list[int] = []

    def refuse(size: int) -> None:
        tries.append(size)
        raise StoreUnavailable("No", "here")

    with FileStore("primary", tmp_path).writer("object", owner=ME) as sink, ResumeNote(sink, refuse):
        fill(sink, BIG)
        until(lambda: tries != [], "it was tried")
        sink.commit()
    assert (tmp_path / "object").read_bytes() == BIG
