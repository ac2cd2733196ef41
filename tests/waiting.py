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
#: Seconds after which a wait is given up. Use it for every timeout of a test that does not belong to the tested rule.
PATIENCE_S = 120.0 * SLOWNESS
#: A short claim or lease that a living holder still renews in time.
CLAIM_S = 2.0 * SLOWNESS

#: Seconds after which a TCP connection of an NFS mount continues at the latest, once its server answers again. A lost
#: packet is sent again after at most 120 s (Linux, TCP_RTO_MAX). sunrpc replaces the connection after timeo times
#: (retrans + 1), 180 s. Another connection of the same mount may answer long before.
RECONNECT_S = 180.0


def until(true: Callable[[], bool], what: str, limit_s: float = PATIENCE_S) -> None:
    """Wait until *true* returns True; fail after *limit_s* with *what* should have happened."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.02)
