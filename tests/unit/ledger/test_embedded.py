"""The embedded broker: it starts, is found, keeps its data, and stops."""

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
    """Return a directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="ssvm-") as directory:
        yield Path(directory)


def test_keeps_jobs(state_dir: Path) -> None:
    """Submitted jobs still exist after a restart."""
    for is_new in (True, False):
        with EmbeddedBroker(state_dir), Ledger(url_of(state_dir)) as ledger:
            assert ledger.submit(NewJob("j1", "download", "z", "download", {}))[1] is is_new
            assert ledger.warnings() == []


def test_second_one_joins(state_dir: Path) -> None:
    """A second worker of the same directory uses the running broker, and does not stop it."""
    with EmbeddedBroker(state_dir), Ledger(url_of(state_dir)) as ledger:
        with EmbeddedBroker(state_dir):
            pass
        assert ledger.counts()["queued"] == 0


def test_stopped(state_dir: Path) -> None:
    """After a stop the broker does not answer, and a second stop has no effect."""
    broker = EmbeddedBroker(state_dir)
    broker.start()
    broker.stop()
    broker.stop()
    with Ledger(url_of(state_dir)) as ledger, pytest.raises(StoreUnavailable):
        ledger.counts()


def test_private(state_dir: Path) -> None:
    """Only its user can connect to the broker."""
    with EmbeddedBroker(state_dir):
        assert stat.S_IMODE((state_dir / "broker").stat().st_mode) == 0o700


def test_too_long() -> None:
    """A path that is too long for a socket is refused with a remedy."""
    with pytest.raises(ConfigError, match="shorter state_dir"):
        url_of(Path("/" + "x" * 120))
