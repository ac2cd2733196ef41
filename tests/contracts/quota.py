"""What whoever counts the room of accounts promises."""

from __future__ import annotations

import threading

import pytest

from ssvm_worker.errors import QuotaExceeded
from ssvm_worker.ledger.quota import AccountUsage, Quota

A, B = "template/tmpl/acme/1", "template/tmpl/acme/2"


def used(quota: Quota) -> dict[str, tuple[int, int]]:
    """Used and reserved by account."""
    return {each.account: (each.used, each.reserved) for each in quota.usage()}


class QuotaContract:
    """The suite; a subclass has the fixture ``quota``."""

    def test_counts(self, quota: Quota) -> None:
        """Each artifact counts once on each store, however often it is noted, and no more when it is gone."""
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
        """What jobs hold counts against the limit, each job's own only once; and no more when they have ended."""
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
        """Accounts are in nobody else's way."""
        quota.note("acme", "s", A, 100)
        with quota.hold("2", "j1", 10) as grow:
            grow(10)

    def test_becomes_used(self, quota: Quota) -> None:
        """What a job has stored it no longer holds: nothing counts twice."""
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
        """Of many that want the last room at once just as many get it as there is room for."""
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
