"""Decide whether and when a job runs again. Pure functions of the error and the number of the attempt."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ssvm_worker.config.schema import RetrySection
from ssvm_worker.errors import Cancelled, StoreAway, StoreDenied, StoreFull, WorkerError

#: For a patient job: the number of attempts, and the factor on the longest delay. With the default of 10 minutes the
#: delay is up to an hour and 45 minutes on average. So the job retries for a week.
_PATIENT_TRIES = 230
_PATIENT_FACTOR = 6
#: The longest delay, in seconds, before a job tries again to reach a store that is away.
_AWAY_S = 30.0


@dataclass(frozen=True)
class RetryDecision:
    """The next state of a job whose attempt ended with an error."""

    #: queued | failed | cancelled
    state: str
    #: Seconds before the next attempt may start; 0 unless the state is queued.
    delay_s: float = 0.0
    #: Whether the attempt counts against max_attempts.
    counted: bool = True


def decide(error: BaseException, number: int, policy: RetrySection) -> RetryDecision:
    """Return the next state of a job whose attempt *number* (from 1) ended with *error*.

    - A cancel by a user is final.
    - A shutdown is not final and costs no attempt.
    - An error that is not a WorkerError is a bug and is not retried. A blind retry costs hours of bandwidth.
    - A store that is away costs no attempt: the time until its server is back says nothing about the job.
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


def decide_patiently(error: BaseException, number: int, policy: RetrySection) -> RetryDecision:
    """Return the next state of a job that waits until a store recovers. A full or refusing store may recover too.

    No attempt counts. *number* is the number of all attempts ever made, and limits them.
    """
    may_pass = isinstance(error, StoreFull | StoreDenied) or (isinstance(error, WorkerError) and error.retryable)
    if may_pass and number < _PATIENT_TRIES:
        longer = policy.model_copy(update={"max_delay_s": policy.max_delay_s * _PATIENT_FACTOR})
        return RetryDecision("queued", backoff(number, longer), counted=False)
    return decide(error, _PATIENT_TRIES, policy.model_copy(update={"max_attempts": _PATIENT_TRIES}))


def backoff(number: int, policy: RetrySection) -> float:
    """Return the seconds to wait after attempt *number*: random, in the upper half of an exponential ceiling."""
    ceiling = min(policy.max_delay_s, policy.first_delay_s * 2 ** min(number - 1, 30))
    return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - jitter, not a secret
