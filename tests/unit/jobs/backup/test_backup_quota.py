"""Quota and backups: a backup above the quota leaves nothing, and stored bytes count."""

from __future__ import annotations

from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.errors import QuotaExceeded, SourceUnavailable
from ssvm_worker.jobs.attempt import Progress
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.ledger.quota import Held, LocalQuota
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.units import MiB
from tests.attempts import again
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


def stored_disks(bench: Bench, vm: TestVM, mode: str) -> int:
    """Return the bytes that the disks of a backup need on one store. Leave no backup."""
    bench.run(vm, mode=mode)
    size = sum(each.size for each in bench.primary.list() if "_packs" in each.key or each.key.endswith(".vmdk"))
    bench.primary = MemoryStore("primary")
    return size


@pytest.mark.parametrize("mode", MODES)
def test_late_failure(bench: Bench, vm: TestVM, mode: str) -> None:
    """The bytes of a disk count once if its lease fails after its last byte."""
    size = stored_disks(bench, vm, mode)
    bench.vcenter.fault(manifest="wrong")
    limited(bench, size)
    bench.run(vm, mode=mode)
    bench.primary = MemoryStore("primary")
    limited(bench, size - 1)
    with pytest.raises(QuotaExceeded):
        bench.run(vm, mode=mode)
    backup.discard(bench.request(vm, mode=mode), bench.attempt())
    assert bench.left() == []


@pytest.mark.parametrize("fault", [{"get": {"file": "disk-1.vmdk", "status": 503}}, {"manifest": "wrong"}])
@pytest.mark.parametrize("mode", MODES)
def test_next_attempt(bench: Bench, vm: TestVM, mode: str, fault: dict[str, Any]) -> None:
    """The bytes that an earlier attempt has stored count, and the reservation of a discarded backup is released."""
    size = stored_disks(bench, vm, mode)
    bench.options = bench.options.model_copy(update={"differing_lease_manifest": "fail"})
    bench.vcenter.fault(**fault)
    quota = limited(bench, 1 << 40)
    with pytest.raises(SourceUnavailable):
        backup.run(bench.request(vm, mode=mode), bench.attempt(will_resume=again))
    bench.vcenter.fault(manifest="")
    bench.attempt_fields["settings"] = config.parse({"quota": {"default": size - 1}}, "test")
    with pytest.raises(QuotaExceeded):
        backup.run(bench.request(vm, mode=mode), bench.attempt(number=2, token=1))
    backup.discard(bench.request(vm, mode=mode), bench.attempt(number=2, token=1))
    assert sum(each.used + each.reserved for each in quota.usage()) == 0
    assert bench.left() == []


def test_moved_bytes() -> None:
    """A stream that fails counts as moved, and its stage begins again; bytes of an earlier attempt were not moved."""
    progress = Progress()
    progress.start("exporting", 100)
    progress.advance(60)
    progress.skip(-60)
    progress.skip(10)
    progress.advance(90)
    shown = progress.snapshot()
    assert (shown["bytes"], shown["moved"]) == (100, 150)


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
