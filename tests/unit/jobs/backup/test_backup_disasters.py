"""Faults of a vCenter during an export: the retry succeeds, or the error is permanent and gives the reason."""

from __future__ import annotations

import pytest

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.errors import ResourceBusy, SourceDenied, SourceNotFound, SourceUnavailable
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.vmware.session import VCenterSession
from tests.backup_bench import FAST, Bench, assert_whole
from tests.images import stream_optimized_pieces
from tests.servers.vcenter import TestVM, address_of


def strike(bench: Bench, what: str) -> None:
    """Cause the fault once, in the middle of the second disk."""
    bench.vcenter.fault(get={"file": "disk-1.vmdk", "do": what, "at": 300_000, "times": 1})


@pytest.mark.parametrize("what", ["logout", "restart", "migrate", "evacuate", "expire", "cut"])
def test_survived(bench: Bench, vm: TestVM, what: str) -> None:
    """After a session end, a vCenter restart or a move of the VM, the same attempt continues with another lease."""
    strike(bench, what)
    before = bench.fetches("disk-1.vmdk")
    result = bench.run(vm, stores=["primary", "archive"])
    assert bench.fetches("disk-1.vmdk") == before + bench.leases + 1
    assert result["snapshot_removed"] is True
    assert result["objects"][-3:] == ["b1.ovf", "b1.mf", "b1.config.json"]
    assert_whole(bench.primary, *vm.streams)
    assert_whole(bench.archive, *vm.streams)


@pytest.mark.parametrize("move", ["lives", "InvalidState"])
def test_moved_or_refused(bench: Bench, vm: TestVM, move: str) -> None:
    """If the lease survives a move of the VM, or vSphere refuses the move, the disk is not fetched again."""
    before = bench.fetches("disk-1.vmdk")
    with bench.session(vm) as session:
        host = session.host()
        bench.vcenter.fault(move=move, get={"file": "disk-1.vmdk", "do": "migrate", "at": 300_000, "times": 1})
        bench.run(vm)
        assert (session.host() != host) is (move == "lives")
    assert bench.fetches("disk-1.vmdk") == before + bench.leases
    assert_whole(bench.primary, *vm.streams)


def test_session_ends_behind_the_last_disk(bench: Bench, vm: TestVM) -> None:
    """A session that ended during the last disk is opened again to get the server's descriptor."""
    bench.options = FAST.model_copy(update={"parallel_disks": 1})
    bench.vcenter.fault(get={"file": "disk-1.vmdk", "do": "logout", "at": 0, "times": 1}, manifest="absent")
    bench.run(vm)
    manifest = read_manifest(bench.primary, bench.request(vm).artifact)
    assert manifest.facts["descriptor"] == "the server's"


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "continues"])
def test_host_in_maintenance(bench: Bench, vm: TestVM, ends: bool) -> None:
    """If the host stays in maintenance mode, the error says so, and the next attempt continues or cleans up."""
    strike(bench, "maintenance")
    with pytest.raises(ResourceBusy, match="Check if the host is in maintenance mode"):
        backup.run(bench.request(vm), bench.attempt(will_resume=lambda _: True))
    if ends:
        bench.vcenter.fault()
        assert bench.run(vm)["snapshot_removed"] is True
        assert_whole(bench.primary, *vm.streams)
        return
    error = bench.fail(vm)
    assert isinstance(error, ResourceBusy)
    assert "is in maintenance mode" in error.what
    assert not bench.left()


def test_vm_deleted(bench: Bench, vm: TestVM) -> None:
    """The deletion of a VM during its backup is a permanent error that says so."""
    strike(bench, "delete")
    error = bench.fail(vm)
    assert isinstance(error, SourceNotFound)
    assert "gone" in error.what
    assert not bench.left()


def test_snapshot_removed(bench: Bench, vm: TestVM) -> None:
    """If the job's snapshot is removed, the next attempt makes another one and fetches all disks."""
    strike(bench, "unsnap")
    before = bench.fetches("disk-1.vmdk")
    with pytest.raises(SourceUnavailable, match="removed the snapshot"):
        backup.run(bench.request(vm), bench.attempt(will_resume=lambda _: True))
    assert bench.run(vm)["snapshot_removed"] is True
    assert bench.fetches("disk-1.vmdk") == before + bench.leases + 1
    assert_whole(bench.primary, *vm.streams)


def test_given_snapshot_removed(bench: Bench, vm: TestVM) -> None:
    """A user's snapshot that is removed during the backup is not replaced."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        theirs = session.find_vm(vm.machine.id).make_snapshot("theirs")
    strike(bench, "unsnap")
    assert isinstance(bench.fail(vm, snapshot=theirs.name), SourceNotFound)
    assert not bench.left()


@pytest.mark.parametrize("status", [401, 403])
def test_host_refuses(bench: Bench, vm: TestVM, status: int) -> None:
    """A host that refuses the request with the cookie too is not asked again."""
    bench.vcenter.fault(get={"status": status})
    before = bench.fetches("disk-0.vmdk")
    assert isinstance(bench.fail(vm, disks=["scsi0:0"]), SourceDenied)
    assert bench.fetches("disk-0.vmdk") == before + 2
    assert not bench.left()


def test_lba_goes_back(bench: Bench, vm: TestVM) -> None:
    """A stream with grains out of order is not a disk, even if its checksum is right."""
    head, first, second, *rest = stream_optimized_pieces(vm.raws[0])
    bench.vcenter.upload(vm.machine.disks[0].file, b"".join((head, second, first, *rest)))
    error = bench.fail(vm)
    assert isinstance(error, SourceUnavailable)
    assert "is repeated, or out of order" in str(error)
    assert not bench.left()
