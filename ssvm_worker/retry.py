"""When to try again: pure functions of the error and the attempt's number."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .errors import Cancelled, WorkerError


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how far apart; delays grow exponentially, with jitter."""

    #: Attempts in all, the first one included.
    max_attempts: int = 5
    #: Seconds before the second attempt, at the most.
    first_delay_s: float = 5.0
    #: Seconds between two attempts, at the most.
    max_delay_s: float = 600.0


@dataclass(frozen=True)
class RetryDecision:
    """What becomes of a job whose attempt ended with an error."""

    #: queued | failed | cancelled
    state: str
    #: Seconds before the next attempt may start; 0 unless the state is queued.
    delay_s: float = 0.0
    #: Whether the attempt is counted against max_attempts.
    counted: bool = True


def decide(error: BaseException, number: int, policy: RetryPolicy) -> RetryDecision:
    """What follows when attempt *number* (from 1) ended with *error*.

    A user's cancel is final, a shutdown's is not and costs no attempt; what is not a WorkerError is our own bug and
    is not tried again, because a blind retry of a bug costs hours of bandwidth.
    """
    if isinstance(error, Cancelled):
        if error.reason == "shutdown":
            return RetryDecision("queued", counted=False)
        return RetryDecision("failed" if error.reason == "deadline" else "cancelled")
    if isinstance(error, WorkerError) and error.retryable and number < policy.max_attempts:
        return RetryDecision("queued", delay_s=backoff(number, policy))
    return RetryDecision("failed")


def backoff(number: int, policy: RetryPolicy) -> float:
    """Seconds to wait after attempt *number*: anywhere in the upper half of an exponential ceiling."""
    ceiling = min(policy.max_delay_s, policy.first_delay_s * 2 ** min(number - 1, 30))
    return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - jitter, not a secret
