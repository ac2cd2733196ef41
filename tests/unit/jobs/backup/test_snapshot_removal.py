"""Snapshots that a backup job could not remove: recorded, reported, and removed by a separate job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ResourceBusy, SourceDenied
from ssvm_worker.jobs.attempt import Progress
from ssvm_worker.jobs.cleanup import job as cleanup
from ssvm_worker.jobs.consolidate import job as consolidate
from ssvm_worker.jobs.services import NullJobs
from ssvm_worker.ledger.open_snapshots import LocalOpenSnapshots, OpenSnapshot, OpenSnapshots
from ssvm_worker.ledger.open_snapshots.redis import SharedOpenSnapshots
from ssvm_worker.operations import doctor
from ssvm_worker.runner.messages import Message
from ssvm_worker.runner.run import run_job
from ssvm_worker.vmware.session import VCenterSession
from ssvm_worker.wiring.assembly import open_ledger
from tests.backup_bench import Bench
from tests.servers.broker import Broker
from tests.servers.vcenter import TestVM, address_of

OLD = OpenSnapshot("j1", "vc1", "vm-1", 1000.5)
#: The faults of a removal: the VM is busy, a consolidation fails, or succeeds without an effect.
FAULTS: dict[str, dict[str, Any]] = {
    "busy": {"calls": {"RemoveSnapshot_Task": "TaskInProgress"}},
    "consolidation fails": {"consolidate": True, "calls": {"ConsolidateVMDisks_Task": "FileLocked"}},
    "consolidation has no effect": {"consolidate": True, "locked": True},
}


@pytest.fixture(params=["local", "shared"])
def open_snapshots(request: pytest.FixtureRequest, broker: Broker) -> OpenSnapshots:
    """Return an empty record of snapshots, in memory or in a broker."""
    if request.param == "local":
        return LocalOpenSnapshots()
    return SharedOpenSnapshots(broker.url, prefix=broker.prefix)


def test_record_of_snapshots(open_snapshots: OpenSnapshots) -> None:
    """Snapshots are listed by age, with one entry for each job, until they are forgotten."""
    newer = OpenSnapshot("j0", "vc2", "vm-2", 2000.0, needs_consolidation=True)
    for each in (newer, OpenSnapshot("j1", "vc1", "vm-1", 5.0), OLD):
        open_snapshots.note(each)
    assert open_snapshots.all() == [OLD, newer]
    open_snapshots.forget("j1")
    open_snapshots.forget("unknown")
    assert open_snapshots.all() == [newer]


def test_damaged_entry(broker: Broker) -> None:
    """A damaged entry hides no other one."""
    known = SharedOpenSnapshots(broker.url, prefix=broker.prefix)
    known.note(OLD)
    known._redis.hset(f"{broker.prefix}ssvm.snapshots", mapping={"j2": "{", "j3": "[]", "j4": '{"created": "x"}'})
    assert known.all() == [OLD]


def request_of(vm: TestVM) -> consolidate.Request:
    """Return the request that removes the snapshot of job-1."""
    place = {"account": "acme", "volume": "vol1", "id": "b1", "vcenter": "vc1", "vm": vm.machine.id}
    return consolidate.Request(**place, backup="job-1")


@pytest.mark.parametrize("name", FAULTS)
def test_job_removes_it_later(bench: Bench, vm: TestVM, name: str) -> None:
    """A snapshot or delta disks that a backup had to leave are recorded until the job of their own succeeds."""
    known = bench.attempt_fields["open_snapshots"] = LocalOpenSnapshots()
    bench.vcenter.fault(**FAULTS[name])
    assert bench.run(vm)["snapshot_removed"] is False
    [left] = known.all()
    assert (left.job_id, left.vcenter, left.vm) == ("job-1", "vc1", vm.machine.id)
    assert left.needs_consolidation is (name != "busy")
    with pytest.raises(ResourceBusy):
        consolidate.run(request_of(vm), bench.attempt(job_id="job-2"))
    bench.vcenter.fault()
    done = consolidate.run(request_of(vm), bench.attempt(job_id="job-2"))
    assert done == {"vm": vm.machine.id, "removed": name == "busy"}
    assert known.all() == []


def test_successful_backup_leaves_no_entry(bench: Bench, vm: TestVM) -> None:
    """A snapshot is recorded while it exists, and not after its removal."""
    seen = []

    class Recording(LocalOpenSnapshots):
        def note(self, snapshot: OpenSnapshot) -> None:
            seen.append(snapshot.job_id)
            super().note(snapshot)

    known = bench.attempt_fields["open_snapshots"] = Recording()
    bench.run(vm)
    assert (seen, known.all()) == (["job-1"], [])


def test_removal_without_the_privilege(bench: Bench, vm: TestVM) -> None:
    """A missing privilege ends the removal job with its name."""
    with bench.session(vm) as it:
        it.make_snapshot("job-1")
    bench.vcenter.fault(lacks=["VirtualMachine.State.RemoveSnapshot"])
    with pytest.raises(SourceDenied) as refused:
        consolidate.run(request_of(vm), bench.attempt(job_id="job-2"))
    assert "VirtualMachine.State.RemoveSnapshot" in refused.value.remedy
    bench.vcenter.fault()
    consolidate.run(request_of(vm), bench.attempt(job_id="job-2"))


def test_deleted_vm(bench: Bench, vm: TestVM) -> None:
    """If the VM is gone, so are its snapshots, and the entry is forgotten."""
    known = bench.attempt_fields["open_snapshots"] = LocalOpenSnapshots()
    known.note(OpenSnapshot("job-1", "vc1", "vm-99999", 5.0))
    gone = request_of(vm).model_copy(update={"vm": "vm-99999"})
    assert consolidate.run(gone, bench.attempt(job_id="job-2"))["removed"] is False
    assert known.all() == []


def test_clean_up_forgets(bench: Bench, vm: TestVM) -> None:
    """A clean-up forgets snapshots that no longer exist, and keeps those of running jobs and of other vCenters."""

    class Ended(NullJobs):
        def ended(self, job_id: str) -> bool:
            return job_id == "ended"

    known = LocalOpenSnapshots()
    for job_id, created in (("ended", 5.0), ("runs", 6.0), ("foreground", 6.5)):
        known.note(OpenSnapshot(job_id, "vc1", vm.machine.id, created))
    known.note(OpenSnapshot("gone", "vc2", "vm-1", 7.0))
    vcenter = {"host": "127.0.0.1", "username": "u", "password": "p"}
    settings = parse({"vcenters": {"vc1": vcenter}}, "test")
    given = {"jobs": Ended(), "settings": settings, "open_snapshots": known}
    cleanup.run(cleanup.Request(dry_run=True), bench.attempt(**given))
    assert len(known.all()) == 4
    with bench.session(vm) as it:
        running = it.make_snapshot("runs")
        cleanup.run(cleanup.Request(), bench.attempt(**given))
        it.remove_snapshot(running)
    assert [each.job_id for each in known.all()] == ["runs", "gone"]


@pytest.mark.plain_vcenter  # other vCenters have findings of their own
@pytest.mark.parametrize("fault", [{}, {"consolidate": True, "locked": True}])
def test_findings(bench: Bench, vm: TestVM, fault: dict[str, Any]) -> None:
    """Disks that need consolidation are a finding of the vCenter, and a warning of the next backup of the VM."""
    bench.vcenter.fault(**fault)
    bench.run(vm)
    with VCenterSession(address_of(bench.vcenter)) as session:
        found = [each for each in session.examine() if f"({vm.machine.id})" in each.detail]
    assert [(each.check, each.state) for each in found] == ([("consolidation", "warning")] if fault else [])
    warnings = bench.run(vm, id="b2")["warnings"]
    assert [each["check"] for each in warnings] == (["consolidation"] if fault else [])
    bench.vcenter.fault()
    assert bench.run(vm, id="b3")["snapshot_removed"] is True


@pytest.fixture
def site(bench: Bench, broker: Broker, tmp_path: Path) -> Settings:
    """Return the settings of a worker with this vCenter, a broker and a directory as its store."""
    address = address_of(bench.vcenter)
    login = {"username": address.username, "password": address.password, "ca_file": str(address.ca_file)}
    values = {
        "zone": "z",
        "broker": {"url": broker.url, "prefix": broker.prefix},
        "state_dir": str(tmp_path / "state"),
        "stores": {"primary": {"url": f"file://{tmp_path / 'store'}"}},
        "vcenters": {"vc1": {"host": address.host, "port": address.port} | login},
        "backup": {"lease_delay_s": 0.01, "spill_bytes": 0},
        "retry": {"first_delay_s": 0.01},
    }
    (tmp_path / "store").mkdir()
    return parse(values, "test")


def test_session_ends_before_the_removal(bench: Bench, vm: TestVM) -> None:
    """If the session ends before the removal, a new session removes the snapshot: no answer is not "no snapshot"."""

    def publish(progress: dict[str, Any]) -> None:
        if progress["stage"] == "removing the snapshot":
            bench.vcenter.strike("logout")

    bench.attempt_fields["progress"] = Progress(publish)
    assert bench.run(vm)["snapshot_removed"] is True
    assert "ssvm-backup-job-1" not in bench.vcenter.state()["snapshots"]


def test_worker_queues_the_removal(bench: Bench, vm: TestVM, site: Settings) -> None:
    """The backup's worker queues a job for the removal, which removes the snapshot once the VM is free."""
    bench.vcenter.fault(**FAULTS["busy"])
    place = {"account": "acme", "volume": "vol1", "id": "b1", "vcenter": "vc1", "vm": vm.machine.id}
    run_job(site, Message("backup", [place | {"job_id": "job-1"}], {}, "t1"))
    with open_ledger(site) as ledger:
        result = ledger.get("job-1").result or {}
        removal = ledger.get(result["removal_job"])
        assert (result["snapshot_removed"], removal.state, removal.job) == (False, "queued", "consolidate")
        [row] = list(doctor._snapshots(site))
        assert (row.check, row.warning) == ("snapshots", False)
        bench.vcenter.fault()
        run_job(site, Message("consolidate", [removal.request], {}, "t2"))
        assert ledger.get(removal.job_id).state == "succeeded"
    assert "ssvm-backup-job-1" not in bench.vcenter.state()["snapshots"]
    assert list(doctor._snapshots(site)) == []
