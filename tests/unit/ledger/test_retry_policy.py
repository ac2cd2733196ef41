"""When a job is tried again."""

from __future__ import annotations

import pytest

from ssvm_worker.errors import (
    Cancelled,
    ChecksumMismatch,
    ConfigError,
    CorruptImage,
    LeaseLost,
    ObjectNotFound,
    SourceUnavailable,
    StoreAway,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    UnsafeImage,
)
from ssvm_worker.ledger.retry_policy import RetryDecision, RetryPolicy, backoff, decide, decide_patiently

POLICY = RetryPolicy(max_attempts=3, first_delay_s=10, max_delay_s=60)


@pytest.mark.parametrize(
    ("error", "number", "state"),
    [
        (SourceUnavailable("x"), 1, "queued"),
        (StoreUnavailable("x"), 2, "queued"),
        (LeaseLost("x"), 3, "failed"),
        (LeaseLost("x"), 4, "failed"),
        (ChecksumMismatch("x"), 1, "failed"),
        (UnsafeImage("x"), 1, "failed"),
        (ConfigError("x"), 1, "failed"),
        (Cancelled("user"), 1, "cancelled"),
        (Cancelled("deadline"), 1, "failed"),
        (ValueError("x"), 1, "failed"),
        (KeyboardInterrupt(), 1, "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_decide(error: BaseException, number: int, state: str) -> None:
    """What may pass is tried again until the attempts are used up; a permanent error and our own bugs never are."""
    decision = decide(error, number, POLICY)
    assert decision.state == state
    assert (decision.delay_s > 0) == (state == "queued")
    assert decision.counted


def test_shutdown_costs_nothing() -> None:
    """A worker that shuts down gives the job back at once, and however often that happens it is not counted."""
    assert decide(Cancelled("shutdown"), 99, POLICY) == RetryDecision("queued", 0.0, counted=False)


def test_store_that_is_away() -> None:
    """A job waits uncounted for a store that does not answer, half a minute at most between two looks."""
    decision = decide(StoreAway("x"), 100_000, POLICY)
    assert (decision.state, decision.counted) == ("queued", False)
    assert 0 < decision.delay_s <= 30


@pytest.mark.parametrize(("wanted", "waits"), [(0.0, 10.0), (45.0, 45.0), (1e9, 60.0)])
def test_wait_that_is_wanted(wanted: float, waits: float) -> None:
    """A server that asks to be left alone for a while is, up to the longest delay of the settings."""
    error = SourceUnavailable("x")
    error.after_s = wanted
    assert decide(error, 1, POLICY).delay_s <= waits
    assert decide(error, 1, POLICY).delay_s >= min(wanted, 60.0)


@pytest.mark.parametrize(("number", "ceiling"), [(1, 10), (2, 20), (3, 40), (4, 60), (50, 60), (100_000, 60)])
def test_backoff(number: int, ceiling: float) -> None:
    """The delay doubles up to its limit, in the upper half of it, and is not the same for all workers."""
    delays = [backoff(number, POLICY) for _ in range(50)]
    assert ceiling / 2 <= min(delays) < max(delays) <= ceiling


@pytest.mark.parametrize("error", [StoreFull("x"), StoreDenied("x"), StoreUnavailable("x"), SourceUnavailable("x")])
def test_patience(error: Exception) -> None:
    """A patient job waits for a store that is full, refuses or is away, uncounted, six times as long as others."""
    decision = decide_patiently(error, 100, POLICY)
    assert (decision.state, decision.counted) == ("queued", False)
    assert 180 <= decision.delay_s <= 360


@pytest.mark.parametrize("error", [ObjectNotFound("x"), CorruptImage("x"), Cancelled("deadline"), ValueError("x")])
def test_patience_has_its_reasons(error: Exception) -> None:
    """A patient job gives up like any other where waiting cannot help."""
    assert decide_patiently(error, 1, POLICY).state == "failed"


def test_patience_ends() -> None:
    """After some 200 attempts, about a week, a patient job has failed too."""
    assert decide_patiently(StoreFull("x"), 1000, POLICY).state == "failed"
    assert decide_patiently(StoreUnavailable("x"), 1000, POLICY).state == "failed"


def test_patience_at_shutdown() -> None:
    """A worker that shuts down gives a patient job back at once, like any other."""
    assert decide_patiently(Cancelled("shutdown"), 1, POLICY) == RetryDecision("queued", 0.0, counted=False)
