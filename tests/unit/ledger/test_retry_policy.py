"""The rules for retries of a job."""

from __future__ import annotations

import pytest

from ssvm_worker.config.schema import RetrySection
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
from ssvm_worker.ledger.retry_policy import RetryDecision, backoff, decide, decide_patiently

POLICY = RetrySection(max_attempts=3, first_delay_s=10, max_delay_s=60)


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
    """A temporary error is tried again up to the attempts; permanent errors and bugs are not."""
    decision = decide(error, number, POLICY)
    assert decision.state == state
    assert (decision.delay_s > 0) == (state == "queued")
    assert decision.counted


def test_shutdown_costs_nothing() -> None:
    """A worker that shuts down returns the job at once, and this never counts as an attempt."""
    assert decide(Cancelled("shutdown"), 99, POLICY) == RetryDecision("queued", 0.0, counted=False)


def test_store_that_is_away() -> None:
    """A job waits uncounted for an absent store, with at most half a minute between two tries."""
    decision = decide(StoreAway("x"), 100_000, POLICY)
    assert (decision.state, decision.counted) == ("queued", False)
    assert 0 < decision.delay_s <= 30


@pytest.mark.parametrize(("wanted", "waits"), [(0.0, 10.0), (45.0, 45.0), (1e9, 60.0)])
def test_wait_that_is_wanted(wanted: float, waits: float) -> None:
    """The delay that a server requests is respected, up to the longest delay of the settings."""
    error = SourceUnavailable("x")
    error.after_s = wanted
    assert decide(error, 1, POLICY).delay_s <= waits
    assert decide(error, 1, POLICY).delay_s >= min(wanted, 60.0)


@pytest.mark.parametrize(("number", "ceiling"), [(1, 10), (2, 20), (3, 40), (4, 60), (50, 60), (100_000, 60)])
def test_backoff(number: int, ceiling: float) -> None:
    """The delay doubles up to its limit, in its upper half, and differs between workers."""
    delays = [backoff(number, POLICY) for _ in range(50)]
    assert ceiling / 2 <= min(delays) < max(delays) <= ceiling


@pytest.mark.parametrize("error", [StoreFull("x"), StoreDenied("x"), StoreUnavailable("x"), SourceUnavailable("x")])
def test_patience(error: Exception) -> None:
    """A patient job waits for a full, refusing or absent store uncounted, six times as long as others."""
    decision = decide_patiently(error, 100, POLICY)
    assert (decision.state, decision.counted) == ("queued", False)
    assert 180 <= decision.delay_s <= 360


@pytest.mark.parametrize("error", [ObjectNotFound("x"), CorruptImage("x"), Cancelled("deadline"), ValueError("x")])
def test_patience_has_its_reasons(error: Exception) -> None:
    """A patient job fails like any other if a wait cannot help."""
    assert decide_patiently(error, 1, POLICY).state == "failed"


def test_patience_ends() -> None:
    """After some 200 attempts, about a week, a patient job fails too."""
    assert decide_patiently(StoreFull("x"), 1000, POLICY).state == "failed"
    assert decide_patiently(StoreUnavailable("x"), 1000, POLICY).state == "failed"


def test_patience_at_shutdown() -> None:
    """A worker that shuts down returns a patient job at once, like any other."""
    assert decide_patiently(Cancelled("shutdown"), 1, POLICY) == RetryDecision("queued", 0.0, counted=False)
