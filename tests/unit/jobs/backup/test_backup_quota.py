"""Quota and backups: a backup above the quota leaves nothing, and stored bytes count."""

from __future__ import annotations

import pytest

from ssvm_worker import config
from ssvm_worker.errors import QuotaExceeded
from ssvm_worker.ledger.quota import Held, LocalQuota
from ssvm_worker.units import MiB
from tests.backup_bench import Bench
from tests.servers.vcenter import TestVM

MODES = ("full", "incremental")


def limited(bench: Bench, most: int | None) -> LocalQuota:
    quota = LocalQuota()
    bench.attempt_fields = {"quota": quota, "settings": config.parse({"quota": {"default": most}}, "test")}
    return quota


def stored(bench: Bench) -> int:
    """Return the stored objects without the manifests."""
    there = (each for store in (bench.primary, bench.archive) for each in store.list())
    return sum(each.size for each in there if not each.key.endswith("manifest.json"))


@pytest.mark.parametrize("mode", MODES)
def test_counted(bench: Bench, vm: TestVM, mode: str) -> None:
    """All objects of a backup count on each store, including packs, and the reservation is released."""
    quota = limited(bench, 1 << 40)
    bench.run(vm, stores=["primary", "archive"], mode=mode)
    (usage,) = quota.usage()
    assert (usage.account, usage.used, usage.reserved) == ("acme", stored(bench), 0)


@pytest.mark.parametrize("mode", MODES)
def test_refused(bench: Bench, vm: TestVM, mode: str) -> None:
    """A backup that exceeds the quota fails while it runs, and leaves nothing on stores and vCenter."""
    quota = limited(bench, 1000)
    assert isinstance(bench.fail(vm, mode=mode), QuotaExceeded)
    assert bench.left() == []
    assert sum(each.used + each.reserved for each in quota.usage()) == 0


def test_fetched_again() -> None:
    """A restarted stream is reserved once, and so are the bytes on each of two stores."""
    asked: list[int] = []
    held = Held(asked.append, copies=2)
    first, second = held.part(), held.part()
    first.took(bytes(60 * MiB))
    second.took(bytes(60 * MiB))
    first.take_back()
    first.took(bytes(60 * MiB))
    assert max(asked) <= 2 * (120 + 64) * MiB
    held.expect(60 * MiB)
    held.expect(None)
    assert asked == sorted(asked)
