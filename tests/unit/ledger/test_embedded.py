"""The broker of our own: it starts, is found, keeps what it was told, and stops."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import ConfigError, StoreUnavailable
from ssvm_worker.ledger.embedded import EmbeddedBroker, url_of
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="ssvm-") as directory:
        yield Path(directory)


def test_keeps_jobs(state_dir: Path) -> None:
    """What was submitted is still there when it is started again."""
    for is_new in (True, False):
        with EmbeddedBroker(state_dir), Ledger(url_of(state_dir)) as ledger:
            assert ledger.submit(NewJob("j1", "download", "z", "download", {}))[1] is is_new
            assert ledger.warnings() == []


def test_second_one_joins(state_dir: Path) -> None:
    """A second worker of the same directory uses the broker that runs, and does not stop it."""
    with EmbeddedBroker(state_dir), Ledger(url_of(state_dir)) as ledger:
        with EmbeddedBroker(state_dir):
            pass
        assert ledger.counts()["queued"] == 0


def test_stopped(state_dir: Path) -> None:
    """After the stop nobody answers, and stopping twice is fine."""
    broker = EmbeddedBroker(state_dir)
    broker.start()
    broker.stop()
    broker.stop()
    with Ledger(url_of(state_dir)) as ledger, pytest.raises(StoreUnavailable):
        ledger.counts()


def test_private(state_dir: Path) -> None:
    """Nobody but its user can reach it."""
    with EmbeddedBroker(state_dir):
        assert stat.S_IMODE((state_dir / "broker").stat().st_mode) == 0o700


def test_too_long() -> None:
    """A path that no socket can have is refused with what to do."""
    with pytest.raises(ConfigError, match="shorter state_dir"):
        url_of(Path("/" + "x" * 120))
