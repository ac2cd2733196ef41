"""A circuit breaker as a value: whether a store may be used, and why not. Who keeps it decides where it is shared."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"
#: Seconds until an open breaker lets one try through: at first, and at the most; doubled by each try that fails.
_FIRST_S = 5.0
_MOST_S = 60.0


@dataclass(frozen=True)
class CircuitBreaker:
    """closed: used as it likes · open: refused until ``due`` · half-open: one try is under way, all others are refused.

    Times are seconds since the epoch, so that processes can share them.
    """

    state: str = CLOSED
    #: Why it opened, and when; empty and 0 while it is closed.
    reason: str = ""
    since: float = 0.0
    #: When the next try may be made.
    due: float = 0.0
    #: Failures in a row.
    failures: int = 0

    def allows(self, now: float) -> bool:
        """Whether the store may be tried now."""
        return self.state == CLOSED or now >= self.due

    def tried(self, now: float, limit_s: float) -> CircuitBreaker:
        """One try is let through; another follows after *limit_s* even if nothing is heard of it."""
        return self if self.state == CLOSED else replace(self, state=HALF_OPEN, due=now + limit_s)

    def failed(self, now: float, reason: str) -> CircuitBreaker:
        """Open, or still so: *since* is when it all began."""
        wait_s = min(_MOST_S, _FIRST_S * 2 ** min(self.failures, 10))
        return CircuitBreaker(OPEN, reason, self.since or now, now + wait_s, self.failures + 1)

    def worked(self) -> CircuitBreaker:
        """Closed."""
        return CircuitBreaker()

    def described(self) -> str:
        """In words; empty while it is closed."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.since))
        return f"{self.state} since {since}: {self.reason}" if self.state != CLOSED else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
