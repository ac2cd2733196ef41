"""When to try again: pure functions of the error and the attempt's number."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from ssvm_worker.errors import Cancelled, StoreAway, StoreDenied, StoreFull, WorkerError

#: Of a patient job: attempts in all, and how much longer than others it waits between two at the most. With the
#: default of 10 minutes that is up to an hour, 45 minutes on average, and so a week.
_PATIENT_TRIES = 230
_PATIENT_FACTOR = 6


#: Seconds between two looks of a job at a store that is away, at the most.
_AWAY_S = 30.0


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
    is not tried again, because a blind retry of a bug costs hours of bandwidth. A store that is away costs no attempt:
    how long its server takes to come back says nothing about the job.
    """
    if isinstance(error, Cancelled):
        if error.reason == "shutdown":
            return RetryDecision("queued", counted=False)
        return RetryDecision("failed" if error.reason == "deadline" else "cancelled")
    if isinstance(error, StoreAway):
        delay_s = random.uniform(_AWAY_S / 2, _AWAY_S)  # noqa: S311 - jitter
        return RetryDecision("queued", max(delay_s, min(error.after_s, policy.max_delay_s)), counted=False)
    if isinstance(error, WorkerError) and error.retryable and number < policy.max_attempts:
        return RetryDecision("queued", max(backoff(number, policy), min(error.after_s, policy.max_delay_s)))
    return RetryDecision("failed")


def decide_patiently(error: BaseException, number: int, policy: RetryPolicy) -> RetryDecision:
    """The same for a job that waits until a store is well again: that it is full, or refuses, may pass too.

    No attempt is counted, so that *number*, of all attempts ever made, sets the end.
    """
    may_pass = isinstance(error, StoreFull | StoreDenied) or (isinstance(error, WorkerError) and error.retryable)
    if may_pass and number < _PATIENT_TRIES:
        longer = replace(policy, max_delay_s=policy.max_delay_s * _PATIENT_FACTOR)
        return RetryDecision("queued", backoff(number, longer), counted=False)
    return decide(error, _PATIENT_TRIES, replace(policy, max_attempts=_PATIENT_TRIES))


def backoff(number: int, policy: RetryPolicy) -> float:
    """Seconds to wait after attempt *number*: anywhere in the upper half of an exponential ceiling."""
    ceiling = min(policy.max_delay_s, policy.first_delay_s * 2 ** min(number - 1, 30))
    return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - jitter, not a secret
