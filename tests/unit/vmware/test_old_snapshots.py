"""Clean-up of snapshots on a vCenter: only the worker's old snapshots of ended jobs."""

from __future__ import annotations

from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.jobs.cleanup import job as cleanup
from ssvm_worker.jobs.services import NullJobs
from ssvm_worker.units import KiB
from ssvm_worker.vmware.session import VCenterSession
from ssvm_worker.vmware.snapshot import find_old_snapshots
from tests.backup_bench import Bench
from tests.servers.vcenter import TestVM, address_of, make_vm

# The tests remove snapshots themselves, and a profile may refuse the first removals.
pytestmark = pytest.mark.plain_vcenter

VCENTER = {"host": "127.0.0.1", "username": "u", "password": "p"}
WITH_VCENTER = config.parse({"vcenters": {"vc1": VCENTER}}, "test")


class Known(NullJobs):
    """A ledger in which job ended has ended, another job runs, and all others are unknown."""

    def ended(self, job_id: str) -> bool:
        """Return whether that job is known and has ended."""
        return job_id == "ended"


@pytest.fixture
def snapshots(bench: Bench, vm: TestVM) -> Any:
    """Make two-day-old snapshots of an ended, a running and an unknown job, and one of another program."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        it = session.find_vm(vm.machine.id)
        made = [it.make_snapshot(job_id) for job_id in ("ended", "runs", "unknown")]
        theirs = it._vm.CreateSnapshotEx_Task(name="before the upgrade", description="by hand", memory=False)
        it._connection.finish(theirs, 60)
        bench.vcenter.age_snapshots(vm.machine.id, days=2)
        yield lambda: sorted(each.job_id for each in session.leftovers() if each.vm == vm.machine.id)
        for each in made:
            it.remove_snapshot(each)


def clean(bench: Bench, **fields: Any) -> dict[str, Any]:
    """Clean up as a worker whose settings name that vCenter."""
    request = cleanup.Request(**fields)
    return cleanup.run(request, bench.attempt(jobs=Known(), settings=WITH_VCENTER))


def test_of_an_ended_job(bench: Bench, vm: TestVM, snapshots: Any) -> None:
    """Only the snapshot of the ended job is deleted; those of running, unknown and foreign jobs stay."""
    told = clean(bench, dry_run=True)
    assert snapshots() == ["ended", "runs", "unknown"]
    assert told["counts"] == {"snapshot": 1}
    assert "the job ended, which has ended" in told["found"][0]["why"]

    assert clean(bench)["counts"] == {"snapshot": 1}
    assert snapshots() == ["runs", "unknown"]
    assert "before the upgrade" in bench.vcenter.state()["snapshots"]
    assert clean(bench)["counts"] == {}


def test_a_busy_vm(bench: Bench, vm: TestVM, snapshots: Any) -> None:
    """A VM that is busy does not stop the removal on other VMs, and the clean-up reports the failure."""
    other = make_vm(bench.vcenter, 64 * KiB)
    with bench.session(other) as it:
        it.make_snapshot("ended")
        bench.vcenter.age_snapshots(other.machine.id, days=2)
        bench.vcenter.fault(calls={"RemoveSnapshot_Task": {"fault": "TaskInProgress", "times": 1}})
        told = clean(bench)
        assert (told["counts"], set(told["failed"])) == ({"snapshot": 1}, {"vc1"})
        assert clean(bench)["counts"] == {"snapshot": 1}
        assert snapshots() == ["runs", "unknown"]
        assert it.own_snapshot("ended") is None


def test_a_young_one_stays(bench: Bench, vm: TestVM, snapshots: Any) -> None:
    """A snapshot younger than older_than stays, because its removal may be in progress."""
    assert clean(bench, older_than="7d")["counts"] == {}
    assert snapshots() == ["ended", "runs", "unknown"]


@pytest.mark.parametrize("escaped", [True, False])
def test_special_characters(bench: Bench, vm: TestVM, escaped: bool) -> None:
    """The snapshot of a job with special characters in its id is found again, whether vSphere escapes them or not."""
    bench.vcenter.fault(escape_names=escaped)
    job_id = "50%25/of\\it"
    with bench.session(vm) as it:
        made = it.make_snapshot(job_id)
        found = it.own_snapshot(job_id)
        assert found
        assert found.moref == it.given_snapshot(f"ssvm-backup-{job_id}").moref == made.moref
        assert job_id in [each.job_id for each in find_old_snapshots(it._connection)]
        it.remove_snapshot(made)


def test_a_vcenter_that_is_away(bench: Bench) -> None:
    """A vCenter that cannot be reached is reported as failed, and the stores are still cleaned."""
    bench.address = {"password": "wrong"}
    result = clean(bench)
    assert set(result["failed"]) == {"vc1"}


def test_a_ledger_that_is_away(bench: Bench, vm: TestVM, snapshots: Any) -> None:
    """If the ledger cannot say which jobs have ended, no snapshot is deleted."""

    class Away(Known):
        def ended(self, job_id: str) -> bool:
            raise StoreUnavailable("The broker is away", job_id)

    result = cleanup.run(cleanup.Request(), bench.attempt(jobs=Away(), settings=WITH_VCENTER))
    assert result["failed"]
    assert len(snapshots()) == 3
