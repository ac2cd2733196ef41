"""The limits of every wait in the tests, in one place, and scaled by how slow this machine is now.

No test fails because the machine is slow. A limit here only ends a test that would otherwise hang.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

#: Seconds that the workload of ``_measure`` takes on an idle core of a server of 2023.
_REFERENCE_S = 0.06
#: A slower machine than this waits no longer, so that a hanging test still ends.
_SLOWEST = 4.0


def _measure() -> float:
    """Return how many times slower than the reference this machine runs Python now; at least 1.

    Other processes, an emulated processor and an old one all count, because the measure is elapsed time.
    """
    started = time.perf_counter()
    for _ in range(3_000_000):
        pass
    return min(max((time.perf_counter() - started) / _REFERENCE_S, 1.0), _SLOWEST)


#: Measured once, by the first process of a run; the processes that pytest starts inherit it.
SLOWNESS = float(os.environ.setdefault("TESTS_SLOWNESS", f"{_measure():.2f}"))
#: Seconds after which a wait is given up. Use it for every timeout of a test that is no part of the tested rule.
PATIENCE_S = 120.0 * SLOWNESS
#: A short claim or lease that a living holder still renews in time.
CLAIM_S = 2.0 * SLOWNESS


def until(true: Callable[[], bool], what: str) -> None:
    """Wait until *true* returns True; fail after PATIENCE_S with *what* should have happened."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.02)
