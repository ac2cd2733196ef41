"""The contract of every quota implementation."""

from __future__ import annotations

import threading

import pytest

from ssvm_worker.errors import QuotaExceeded
from ssvm_worker.ledger.quota import AccountUsage, Quota

A, B = "template/tmpl/acme/1", "template/tmpl/acme/2"


def used(quota: Quota) -> dict[str, tuple[int, int]]:
    """Return the used and reserved bytes of an account."""
    return {each.account: (each.used, each.reserved) for each in quota.usage()}


class QuotaContract:
    """The tests; a subclass has the fixture ``quota``."""

    def test_counts(self, quota: Quota) -> None:
        """Each artifact counts once on each store, however often it is noted, until it is deleted."""
        for _ in range(2):
            quota.note("acme", "s", A, 5)
            quota.note("acme", "s", B, 7)
            quota.note("acme", "t", A, 5)
        quota.note("2", "s", "template/tmpl/2/1", 1)
        assert used(quota) == {"2": (1, 0), "acme": (17, 0)}
        assert sorted(quota.places("s")) == [("2", "template/tmpl/2/1"), ("acme", A), ("acme", B)]
        for _ in range(2):
            quota.forget("acme", "s", A)
        assert used(quota)["acme"] == (12, 0)

    def test_holds(self, quota: Quota) -> None:
        """Reservations of running jobs count against the limit, once per job."""
        quota.note("acme", "s", A, 50)
        with quota.hold("acme", "j1", 100) as one, quota.hold("acme", "j2", 100) as two:
            one(20)
            one(30)
            two(20)
            with pytest.raises(QuotaExceeded, match=r"acme.*has used 50 B.*other jobs hold 30 B.*needs 21 B"):
                two(21)
            assert used(quota)["acme"] == (50, 50)
        assert used(quota)["acme"] == (50, 0)

    def test_other_accounts(self, quota: Quota) -> None:
        """Accounts do not affect each other."""
        quota.note("acme", "s", A, 100)
        with quota.hold("2", "j1", 10) as grow:
            grow(10)

    def test_becomes_used(self, quota: Quota) -> None:
        """Stored bytes leave the job's reservation, so no byte counts twice."""
        with quota.hold("acme", "j1", 100) as grow:
            grow(60)
            quota.note("acme", "s", A, 60, "j1")
            assert used(quota)["acme"] == (60, 0)

    def test_large(self, quota: Quota) -> None:
        """Petabytes are counted to the byte."""
        size = (4 << 50) + 1
        with quota.hold("acme", "j1", size) as grow:
            grow(size)
            quota.note("acme", "s", A, size, "j1")
        assert list(quota.usage()) == [AccountUsage("acme", size)]

    def test_race(self, quota: Quota) -> None:
        """If many parallel jobs compete, exactly those that fit get the last room."""
        got: list[int] = []
        together = threading.Barrier(10)

        def want(number: int) -> None:
            with quota.hold("acme", f"j{number}", 30) as grow:
                together.wait()
                try:
                    grow(10)
                    got.append(number)
                except QuotaExceeded:
                    pass
                together.wait()

        threads = [threading.Thread(target=want, args=(number,)) for number in range(10)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(got) == 3
