"""A circuit breaker as a value: whether a store may be used, and why not. The caller stores and shares the value."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"
#: The first and the longest wait of an open breaker before a try, in seconds. Each failed try doubles the wait.
_FIRST_WAIT_S = 5.0
_MAX_WAIT_S = 60.0


@dataclass(frozen=True)
class CircuitBreaker:
    """The state of a breaker. Times are seconds since the epoch, so that processes can share them.

    - closed: all callers may use the store
    - open: all callers are refused until ``due``
    - half-open: one caller tries the store, and all others are refused
    """

    state: str = CLOSED
    #: The reason and the time of the first failure. A closed breaker has an empty reason and 0.
    reason: str = ""
    since: float = 0.0
    #: The time of the next try.
    due: float = 0.0
    #: The number of failures since the last success.
    failures: int = 0

    def allows(self, now: float) -> bool:
        """Return whether a caller may try the store."""
        return self.state == CLOSED or now >= self.due

    def tried(self, now: float, limit_s: float) -> CircuitBreaker:
        """Return the state during a try. If the try does not report within *limit_s*, another may follow."""
        return self if self.state == CLOSED else replace(self, state=HALF_OPEN, due=now + limit_s)

    def failed(self, now: float, reason: str) -> CircuitBreaker:
        """Return the open state after a failure. ``since`` stays the time of the first failure."""
        wait_s = min(_MAX_WAIT_S, _FIRST_WAIT_S * 2 ** min(self.failures, 10))
        return CircuitBreaker(OPEN, reason, self.since or now, now + wait_s, self.failures + 1)

    def worked(self) -> CircuitBreaker:
        """Return the closed state."""
        return CircuitBreaker()

    def described(self) -> str:
        """Return the state, time and reason as text. A closed breaker has an empty text."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.since))
        return f"{self.state} since {since}: {self.reason}" if self.state != CLOSED else ""
