"""The circuit breaker of a store, by a clock that the tests set."""

from __future__ import annotations

from ssvm_worker.stores.nfs.circuit_breaker import CLOSED, HALF_OPEN, OPEN, CircuitBreaker


def test_closed() -> None:
    """A breaker starts closed and allows all calls, and a trial leaves it closed."""
    breaker = CircuitBreaker()
    assert breaker.state == CLOSED
    assert breaker.allows(0)
    assert breaker.tried(0, 10) == breaker


def test_opens() -> None:
    """A failure opens it with reason and time, and no call passes until it is due."""
    breaker = CircuitBreaker().failed(100, "no answer")
    assert (breaker.state, breaker.reason, breaker.since) == (OPEN, "no answer", 100)
    assert not breaker.allows(104.9)
    assert breaker.allows(105)


def test_half_open() -> None:
    """When it is due, one trial passes and the others wait, but not forever if its process ended."""
    breaker = CircuitBreaker().failed(100, "no answer").tried(105, 10)
    assert breaker.state == HALF_OPEN
    assert not breaker.allows(114)
    assert breaker.allows(115)


def test_opens_again() -> None:
    """Each failed trial doubles the wait up to a minute, with the last reason and the first time."""
    breaker, now, waits = CircuitBreaker(), 100.0, []
    for number in range(7):
        breaker = breaker.failed(now, f"no answer {number}")
        waits.append(breaker.due - now)
        now = breaker.due
        breaker = breaker.tried(now, 10)
    assert waits == [5, 10, 20, 40, 60, 60, 60]
    assert (breaker.reason, breaker.since) == ("no answer 6", 100)


def test_closes() -> None:
    """A success closes it, and the next failure starts with the first wait."""
    breaker = CircuitBreaker().failed(100, "a").tried(105, 10).worked()
    assert breaker == CircuitBreaker()
    assert breaker.failed(200, "b").since == 200


def test_described() -> None:
    """The description has state, time and reason, and is empty for a closed breaker."""
    assert CircuitBreaker().described() == ""
    assert CircuitBreaker().failed(0.0, "no answer").described() == "open since 1970-01-01T00:00:00Z: no answer"
