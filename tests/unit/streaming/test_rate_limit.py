"""A limit on bytes per second, for one stream and for all that share it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ssvm_worker.errors import Cancelled
from ssvm_worker.streaming.pipeline import SharedRateLimit, paced


def total(pace: SharedRateLimit, sizes: list[int], rate: float) -> float:
    """Return the last wait in seconds; the tests do not really wait."""
    return [pace.delay(size, rate) for size in sizes][-1]


def test_rate() -> None:
    """Bytes above the rate wait, except for a burst of a tenth of a second."""
    started = time.monotonic()
    assert total(SharedRateLimit(), [1000] * 10, 1000.0) + time.monotonic() - started >= 9.8


def test_fast_enough() -> None:
    """Bytes below the rate do not wait."""
    assert total(SharedRateLimit(), [1], 1e9) == 0


def test_shared_by_processes() -> None:
    """The bytes of other processes count too."""
    pace = SharedRateLimit()
    started = time.monotonic()
    if not (child := os.fork()):
        pace.delay(5000, 1000.0)
        os._exit(0)
    os.waitpid(child, 0)
    assert pace.delay(1000, 1000.0) + time.monotonic() - started >= 5.8


def test_paced() -> None:
    """The strictest limit decides, and the chunks are unchanged."""
    waits: list[float] = []
    chunks = [b"a" * 100, b"b" * 100]
    assert list(paced(chunks, [(SharedRateLimit(), 1000.0), (SharedRateLimit(), 10.0)], waits.append)) == chunks
    assert waits == [pytest.approx(9.9, abs=0.5), pytest.approx(19.9, abs=0.5)]


def test_cancel() -> None:
    """A cancel ends a wait."""

    def wait(_: float) -> None:
        raise Cancelled("user")

    with pytest.raises(Cancelled):
        list(paced([b"a" * 1000], [(SharedRateLimit(), 1.0)], wait))


def test_shared_by_threads() -> None:
    """The bytes of several parallel threads all count."""
    pace, start, count = SharedRateLimit(), threading.Barrier(8), 200

    def run() -> None:
        start.wait()
        for _ in range(count):
            pace.delay(1000, 1000.0)

    began = time.monotonic()
    threads = [threading.Thread(target=run) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert pace.delay(1000, 1000.0) + time.monotonic() - began >= 8 * count


def test_needs_no_directory(tmp_path: Path) -> None:
    """A limit needs no writable directory, as on a read-only host."""
    code = "import os, tempfile; tempfile.tempdir = '/nowhere'; import ssvm_worker.wiring.assembly"
    subprocess.run([sys.executable, "-c", code], check=True)
