"""The circuit breaker of a store, by a clock that the tests turn."""

from __future__ import annotations

from ssvm_worker.stores.nfs.circuit_breaker import CLOSED, HALF_OPEN, OPEN, CircuitBreaker


def test_closed() -> None:
    """A breaker begins closed, lets everything through, and a try leaves it as it is."""
    breaker = CircuitBreaker()
    assert breaker.state == CLOSED
    assert breaker.allows(0)
    assert breaker.tried(0, 10) == breaker


def test_opens() -> None:
    """A failure opens it, with its reason and time; nothing passes until it is due."""
    breaker = CircuitBreaker().failed(100, "no answer")
    assert (breaker.state, breaker.reason, breaker.since) == (OPEN, "no answer", 100)
    assert not breaker.allows(104.9)
    assert breaker.allows(105)


def test_half_open() -> None:
    """When it is due one try is let through and all others wait, but not for ever for one whose process died."""
    breaker = CircuitBreaker().failed(100, "no answer").tried(105, 10)
    assert breaker.state == HALF_OPEN
    assert not breaker.allows(114)
    assert breaker.allows(115)


def test_opens_again() -> None:
    """Each try that fails doubles the wait, up to a minute; the reason is the last one, since is the first."""
    breaker, now, waits = CircuitBreaker(), 100.0, []
    for number in range(7):
        breaker = breaker.failed(now, f"no answer {number}")
        waits.append(breaker.due - now)
        now = breaker.due
        breaker = breaker.tried(now, 10)
    assert waits == [5, 10, 20, 40, 60, 60, 60]
    assert (breaker.reason, breaker.since) == ("no answer 6", 100)


def test_closes() -> None:
    """What works closes it, and the next failure begins anew."""
    breaker = CircuitBreaker().failed(100, "a").tried(105, 10).worked()
    assert breaker == CircuitBreaker()
    assert breaker.failed(200, "b").since == 200


def test_described() -> None:
    """What people read says state, time and reason; nothing of one that is closed."""
    assert CircuitBreaker().described() == ""
    assert CircuitBreaker().failed(0.0, "no answer").described() == "open since 1970-01-01T00:00:00Z: no answer"
