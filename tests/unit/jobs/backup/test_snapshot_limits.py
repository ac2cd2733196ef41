"""Limits while a VM has a snapshot: slots before it, sessions that expire meanwhile, and space on the datastores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pyVmomi import vim

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.errors import Cancelled, SourceDenied, SourceUnavailable
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.jobs.backup import power_watch, snapshot_limits
from ssvm_worker.ledger.slots import LocalSlots, Wait
from ssvm_worker.units import KiB
from ssvm_worker.vmware.session import VM
from tests.backup_bench import FAST, Bench, assert_whole
from tests.servers.vcenter import TestVM, make_vm
from tests.waiting import CLAIM_S


class Eventful(LocalSlots):
    """Slots that record their names and limits, and during the wait for which something happens in vSphere."""

    def __init__(self, bench: Bench, event: str = "", at: str = "esxi:", vm: str = "") -> None:
        super().__init__()
        self.vm = vm
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
            self.bench.vcenter.strike(self.event, self.vm)
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


def test_expired_session_hides_no_host(bench: Bench, vm: TestVM) -> None:
    """A session that has ended is replaced, and is not taken for a host that the user may not read."""
    with bench.session(vm) as it:
        host = it.host()
        bench.vcenter.strike("logout")
        assert it.host() == host
        bench.vcenter.fault(calls={"RetrievePropertiesEx": "NoPermission"})
        assert it.host() == host.rpartition(":")[0] + ":?"


def test_vmotion_in_the_queue(bench: Bench, vm: TestVM) -> None:
    """If the VM moves while the job waits for a slot, the job takes a slot of the new host."""
    slots = bench.attempt_fields["slots"] = Eventful(bench, "migrate", vm=vm.machine.id)
    bench.options = FAST.model_copy(update={"lease_tries": 1, "parallel_disks": 1})
    bench.run(vm)
    assert len([name for name in slots.limits if name.startswith("esxi:")]) == 2
    assert_whole(bench.primary, *vm.streams)


def test_datastore_is_short_of_space(bench: Bench, vm: TestVM) -> None:
    """Little free space on the VM's datastore is a warning, and less refuses the backup before the snapshot."""
    bench.vcenter.fault(datastore_free=12)
    assert "datastore" in [each["check"] for each in bench.run(vm)["warnings"]]
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


def test_unknown_free_space(bench: Bench, vm: TestVM, monkeypatch: pytest.MonkeyPatch) -> None:
    """If vSphere does not answer the question for the free space during the export, the export continues."""
    monkeypatch.setattr(snapshot_limits, "_EVERY_S", 0.0)
    bench.options = FAST.model_copy(update={"lease_tries": 1})
    asked = []

    def unanswered(_: VM) -> None:
        asked.append(1)
        raise SourceUnavailable("Reading the VM's datastores: the session has ended", vm.machine.id)

    class Failing(LocalSlots):
        @contextmanager
        def hold(self, name: str, limit: int, wait: Wait) -> Iterator[None]:
            if name.startswith("esxi:"):
                monkeypatch.setattr(VM, "datastores", unanswered)
            with super().hold(name, limit, wait):
                yield

    bench.attempt_fields["slots"] = Failing()
    bench.run(vm)
    assert asked
    assert_whole(bench.primary, *vm.streams)


@pytest.mark.parametrize(("locks", "pause_s"), [(False, 0.0), (True, 0.0), (True, 1e6)])
def test_switched_off(bench: Bench, vm: TestVM, monkeypatch: pytest.MonkeyPatch, locks: bool, pause_s: float) -> None:
    """A VM that is switched off during the export is a warning, and a pause allows to switch it on."""
    monkeypatch.setattr(power_watch, "_EVERY_S", 0.0)
    bench.options = FAST.model_copy(update={"power_off_pause_s": pause_s})
    before = bench.fetches("disk-0.vmdk")
    outcomes, lock = [], threading.Lock()
    with bench.session(vm) as it:
        it._connection.finish(it._vm.PowerOnVM_Task(), CLAIM_S)

        class SwitchingOff(LocalSlots):
            @contextmanager
            def hold(self, name: str, limit: int, wait: Wait) -> Iterator[None]:
                with super().hold(name, limit, wait):
                    if name.startswith("esxi:") and bench.fetches("disk-0.vmdk") == before and it.is_on():
                        it._connection.finish(it._vm.PowerOffVM_Task(), CLAIM_S)
                    yield

        def switch_on(has_lease: bool) -> None:
            with lock:
                try_to_switch_on(has_lease)

        def try_to_switch_on(has_lease: bool) -> None:
            if bench.fetches("disk-0.vmdk") > before and bool(bench.open_leases()) is has_lease and not it.is_on():
                try:
                    it._connection.finish(it._vm.PowerOnVM_Task(), CLAIM_S)
                    outcomes.append("on")
                except vim.fault.InvalidState:
                    outcomes.append("refused")

        bench.vcenter.fault(lease_locks=locks)
        bench.attempt_fields = {"slots": SwitchingOff(), "confirm": lambda: switch_on(has_lease=True)}
        if pause_s:
            bench.attempt_fields["stop_reason"] = lambda: switch_on(has_lease=False)
        result = bench.run(vm, disks=["scsi0:0"])
    assert set(outcomes) == {"refused" if locks and not pause_s else "on"}
    assert [each["check"] for each in result["warnings"] if each["check"] != "quiescing"] == ["power state"]
    assert bench.fetches("disk-0.vmdk") == before + bench.leases + (1 if pause_s else 0)
    assert_whole(bench.primary, vm.streams[0])


def test_age_of_the_snapshot(bench: Bench, vm: TestVM) -> None:
    """The manifest contains when the snapshot was made, and its age at the end of the export."""
    bench.run(vm)
    manifest = read_manifest(bench.primary, bench.request(vm).artifact)
    assert manifest.source["snapshot"]["created"] > 0
    assert manifest.facts["snapshot_age_s"] >= 0
