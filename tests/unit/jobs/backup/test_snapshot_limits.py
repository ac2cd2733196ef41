"""Limits while a VM has a snapshot: slots before it, sessions that expire meanwhile, and space on the datastores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.errors import Cancelled, SourceDenied
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.jobs.backup import snapshot_limits
from ssvm_worker.ledger.slots import LocalSlots, Wait
from ssvm_worker.units import KiB
from tests.backup_bench import FAST, Bench, assert_whole
from tests.servers.vcenter import TestVM, make_vm


class Eventful(LocalSlots):
    """Slots that record their names and limits, and during the wait for which something happens in vSphere."""

    def __init__(self, bench: Bench, event: str = "", at: str = "esxi:") -> None:
        super().__init__()
        self.bench = bench
        self.event = event
        self.at = at
        self.limits: dict[str, int] = {}
        self.snapshots: dict[str, int] = {}

    @contextmanager
    def hold(self, name: str, limit: int, wait: Wait) -> Iterator[None]:
        self.limits[name] = limit
        self.snapshots[name] = self.bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
        if self.event and name.startswith(self.at):
            self.bench.vcenter.strike(self.event)
            self.event = ""
        with super().hold(name, limit, wait):
            yield


def test_slots_before_the_snapshot(bench: Bench, vm: TestVM) -> None:
    """The job has a slot of the host and one of the datastore before it makes the snapshot."""
    slots = Eventful(bench)
    bench.attempt_fields["slots"] = slots
    bench.options = FAST.model_copy(update={"per_datastore": 3})
    before = bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
    bench.run(vm)
    early = {name: slots.limits[name] for name, made in slots.snapshots.items() if made == before}
    assert sorted(name.rpartition(":")[0].partition(":127")[0] for name in early) == [
        "snapshots:datastore",
        "snapshots:esxi",
    ]
    assert sorted(early.values()) == [2, 3]


def test_full_slots_make_no_snapshot(bench: Bench, vm: TestVM) -> None:
    """A job that waits for a slot and is cancelled has made no snapshot."""
    slots = LocalSlots()
    bench.attempt_fields["slots"] = slots
    before = bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
    with bench.session(vm) as it, slots.hold(f"snapshots:esxi:{it.host()}", 1, lambda _: None):
        bench.options = FAST.model_copy(update={"per_host": 1})
        stopping = bench.attempt(stop_reason=lambda: "user")
        with pytest.raises(Cancelled):
            backup.run(bench.request(vm), stopping)
    assert bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0) == before


@pytest.mark.parametrize("at", ["esxi:", "snapshots:"])
def test_session_expires_in_the_queue(bench: Bench, vm: TestVM, at: str) -> None:
    """A session that expires while the job waits for a slot is replaced, and no lease is lost."""
    bench.attempt_fields["slots"] = Eventful(bench, "logout", at)
    bench.options = FAST.model_copy(update={"lease_tries": 1, "parallel_disks": 1})
    bench.run(vm)
    assert_whole(bench.primary, *vm.streams)


def test_datastore_is_short_of_space(bench: Bench, vm: TestVM) -> None:
    """Little free space on the VM's datastore is a warning, and less refuses the backup before the snapshot."""
    bench.vcenter.fault(datastore_free=12)
    result = bench.run(vm)
    assert [each["check"] for each in result["warnings"]] == ["datastore"]
    before = bench.vcenter.state()["calls"]["CreateSnapshotEx_Task"]
    bench.vcenter.fault(datastore_free=9)
    error = bench.fail(vm, id="b2")
    assert isinstance(error, SourceDenied)
    assert "9 % of LocalDS_0 is free" in error.what
    assert bench.vcenter.state()["calls"]["CreateSnapshotEx_Task"] == before


def test_datastore_fills_during_the_export(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A datastore that fills ends the backup for good, and the job removes its snapshot."""
    monkeypatch.setattr(snapshot_limits, "_EVERY_S", 0.0)
    vm = make_vm(bench.vcenter, 512 * KiB)

    class Filling(LocalSlots):
        @contextmanager
        def hold(self, name: str, limit: int, wait: Wait) -> Iterator[None]:
            with super().hold(name, limit, wait):
                if name.startswith("esxi:"):
                    bench.vcenter.fault(datastore_free=5)
                yield

    bench.attempt_fields["slots"] = Filling()
    with pytest.raises(SourceDenied, match="ends before the snapshot fills"):
        backup.run(bench.request(vm), bench.attempt())
    assert "ssvm-backup-job-1" not in bench.vcenter.state()["snapshots"]
    bench.vcenter.fault()
    backup.discard(bench.request(vm), bench.attempt())


def test_age_of_the_snapshot(bench: Bench, vm: TestVM) -> None:
    """The manifest contains when the snapshot was made, and its age at the end of the export."""
    bench.run(vm)
    manifest = read_manifest(bench.primary, bench.request(vm).artifact)
    assert manifest.source["snapshot"]["created"] > 0
    assert manifest.facts["snapshot_age_s"] >= 0
