"""The threads of a worker: no error ends one."""

from __future__ import annotations

import logging
import re
import threading

import pytest

from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.runner.periodic import PeriodicThread
from tests.neighbours import ROOT
from tests.waiting import PATIENCE_S, until


@pytest.mark.parametrize("error", [ZeroDivisionError("odd"), OSError(24, "too many"), StoreUnavailable("away")])
def test_goes_on(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """A round that fails is logged, and the next one runs."""
    made: list[int] = []

    def act() -> None:
        made.append(1)
        if len(made) == 1:
            raise error

    rounds = PeriodicThread("odd", act, 0.0)
    with caplog.at_level(logging.WARNING):
        rounds.start()
        until(lambda: len(made) > 1, "the next round is made")
        rounds.stop(10)
    assert caplog.records[0].name == "ssvm.odd"
    assert ("Traceback" in caplog.text) == (not isinstance(error, StoreUnavailable))


def test_every_thread_is_one() -> None:
    """Only this module starts threads in a worker's process, so none can end unnoticed."""
    modules = [*(ROOT / "tasks").rglob("*.py"), *(ROOT / "ssvm_worker/runner").rglob("*.py")]
    assert {path.name for path in modules if re.search(r"\bThread\(", path.read_text())} == {"periodic.py"}


def test_ends(caplog: pytest.LogCaptureFixture) -> None:
    """A stopped thread runs no further round."""
    made = threading.Event()
    rounds = PeriodicThread("odd", made.set, 0.0)
    rounds.start()
    assert made.wait(PATIENCE_S)
    rounds.stop(60)
    made.clear()
    assert not rounds._thread.is_alive()
    assert not made.is_set()
    assert not caplog.records
