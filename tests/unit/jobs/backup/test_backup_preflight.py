"""What is found before a backup: what must fail is stopped before anything is touched, the rest is warned of."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.cli import main
from ssvm_worker.errors import Permanent, Retryable, SourceDenied, SourceUnavailable, StoreFull
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.units import KiB
from ssvm_worker.vmware.preflight import PRIVILEGES, SNAPSHOT_PRIVILEGES, PreflightFinding
from ssvm_worker.vmware.session import VCenterSession
from tests.backup_bench import Bench, assert_whole
from tests.faults import store_unreachable
from tests.neighbours import ROOT
from tests.servers.vcenter import TestVM, address_of, make_vm

REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "may not make a snapshot": (
        {"lacks": ["VirtualMachine.State.CreateSnapshot"]},
        SourceDenied,
        "VirtualMachine.State.CreateSnapshot",
    ),
    "may not remove it": ({"lacks": ["VirtualMachine.State.RemoveSnapshot"]}, SourceDenied, "removing"),
    "may not export": ({"lacks": ["VApp.Export"]}, SourceDenied, "VApp.Export"),
    "the host has another certificate": ({"host_thumbprint": "AB:" * 19 + "AB"}, SourceDenied, "not trusted"),
    "the host's name is unknown": ({"host": "esx7.invalid:443"}, SourceUnavailable, "esx7.invalid"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(bench: Bench, vm: TestVM, name: str) -> None:
    """What would end the backup in the middle ends it at once, names what is wrong, and makes no snapshot."""
    fault, expected, told = REFUSALS[name]
    before = bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
    bench.vcenter.fault(**fault)
    error = bench.fail(vm)
    assert isinstance(error, expected)
    assert told in str(error)
    assert bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0) == before
    assert not bench.left()


def test_user_spelt_otherwise(bench: Bench, vm: TestVM) -> None:
    """A user whom the server does not know by that spelling has what the session has."""
    bench.vcenter.fault(lacks=["VApp.Export"], session_has=True)
    assert bench.run(vm)["warnings"] == []


def test_all_at_once(bench: Bench, vm: TestVM) -> None:
    """All that is wrong is told at once; it is permanent if a part of it is."""
    bench.vcenter.fault(lacks=["VApp.Export"], host="esx7.invalid:443")
    bench.primary = MemoryStore("primary", capacity=1000)
    error = bench.fail(vm)
    assert isinstance(error, Permanent)
    assert all(part in str(error) for part in ("VApp.Export", "esx7.invalid", "room on primary"))


def test_host_down(bench: Bench, vm: TestVM) -> None:
    """A host that does not answer may do so later."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        bench.vcenter.fault(host=f"127.0.0.1:{closed.getsockname()[1]}")
        assert isinstance(bench.fail(vm), Retryable)


def test_no_room(bench: Bench, vm: TestVM) -> None:
    """A full primary ends the backup before it begins; a full secondary is a warning, and is owed the backup."""
    bench.archive = MemoryStore("archive", capacity=1000)
    result = bench.run(vm, stores=["primary", "archive"])
    assert "room on archive" in [each["check"] for each in result["warnings"]]
    assert list(result["owed"]) == ["archive"]
    assert isinstance(bench.fail(vm, id="b2", stores=["archive"]), StoreFull)


def test_store_away(bench: Bench, vm: TestVM) -> None:
    """A primary that cannot be asked for its room ends the backup before it begins, and may be there later."""
    bench.primary = store_unreachable(MemoryStore("primary"), "usage")
    with pytest.raises(Retryable, match="room on primary"):
        bench.run(vm)
    bench.primary = MemoryStore("primary")
    assert not bench.left()


WARNINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an independent disk": ({"modes": ("persistent", "independent_persistent")}, {}, "disks"),
    "a raw device": ({"modes": ("persistent", "rdm")}, {}, "disks"),
    "encrypted": ({"encrypted": True}, {}, "encryption"),
    "a virtual TPM": ({"tpm": True}, {}, "encryption"),
    "a device that OVF cannot describe": ({}, {"descriptor_warning": "OvfUnsupportedDeviceExport"}, "OVF descriptor"),
    "no descriptor": ({}, {"descriptor_error": "OvfUnsupportedDeviceExport"}, "OVF descriptor"),
    "privileges cannot be asked for": ({}, {"calls": {"HasUserPrivilegeOnEntities": "NoPermission"}}, "privileges"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warned(bench: Bench, name: str) -> None:
    """What does not end the backup stands in its result and in its manifest, with a remedy."""
    about, fault, check = WARNINGS[name]
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, **about)
    bench.vcenter.fault(**fault)
    wanted = ["scsi0:0"] if check == "disks" else None  # without the disk that no snapshot holds, by request
    warnings = bench.run(vm, disks=wanted)["warnings"]
    assert [each["check"] for each in warnings] == [check]
    assert warnings[0]["remedy"]
    assert read_manifest(bench.primary, bench.request(vm).artifact).facts["warnings"] == warnings


def test_refused_encrypted(bench: Bench) -> None:
    """An encrypted VM that the server refuses to describe is not tried."""
    vm = make_vm(bench.vcenter, 64 * KiB, tpm=True)
    bench.vcenter.fault(descriptor_error="OvfUnsupportedDeviceExport")
    assert isinstance(bench.fail(vm), SourceDenied)


def test_privileges_are_documented() -> None:
    """The role that operators are told to make has every privilege that is asked for."""
    told = (ROOT / "docs/operating.md").read_text()
    needed = [each for ids in (PRIVILEGES | SNAPSHOT_PRIVILEGES).values() for each in ids]
    assert [each for each in needed if f"`{each}`" not in told] == []


def test_given_snapshot(bench: Bench, vm: TestVM) -> None:
    """A backup of a snapshot that is given needs no right to make or remove one."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        theirs = session.find_vm(vm.machine.id)
        snapshot = theirs.make_snapshot("theirs")
        bench.vcenter.fault(lacks=["VirtualMachine.State.CreateSnapshot", "VirtualMachine.State.RemoveSnapshot"])
        bench.run(vm, snapshot=snapshot.moref)
        theirs.remove_snapshot(snapshot)
    assert_whole(bench.primary, *vm.streams)


@pytest.fixture
def doctor(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``ssvm doctor --vcenter vc1``; returns its exit status and the state of each check."""
    address = address_of(bench.vcenter)
    for name in ("host", "port", "username", "password", "ca_file"):
        monkeypatch.setenv(f"SSVM_VCENTERS__VC1__{name.upper()}", str(getattr(address, name)))
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", "file:///tmp")

    def run(*argv: str) -> tuple[int, dict[str, str]]:
        status = main(["doctor", "--vcenter", "vc1", "--json", *argv])
        return status, {row["check"]: row["state"] for row in json.loads(capsys.readouterr().out)}

    return run


def test_doctor(doctor: Callable[..., Any], bench: Bench, vm: TestVM) -> None:
    """``ssvm doctor`` shows what a backup of any VM, or of one, would find; an error is its failure."""
    assert doctor() == (0, {"privileges": "ok", "ESXi host": "ok", "snapshots": "ok"})
    status, found = doctor("--vm", vm.machine.path)
    assert (status, found["OVF descriptor"], found["disks"]) == (0, "ok", "ok")
    bench.vcenter.fault(lacks=["VApp.Export"])
    status, found = doctor("--vm", vm.machine.id)
    assert (status, found["privileges"], found["room on primary"]) == (1, "FAILED", "ok")


def test_of_a_vcenter(bench: Bench, vm: TestVM) -> None:
    """Without a VM the user's privileges at the root are looked at, and the way to each host."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        found: list[PreflightFinding] = session.examine()
    assert {each.check: each.state for each in found} == {"privileges": "ok", "ESXi host": "ok", "snapshots": "ok"}
    assert len(found) == 6  # the simulator has four hosts


def test_leftovers(bench: Bench, vm: TestVM) -> None:
    """Snapshots that dead jobs have left are found wherever they are, and nobody else's is taken for one of ours."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        it = session.find_vm(vm.machine.id)
        made = it.make_snapshot("dead-job")
        theirs = it._vm.CreateSnapshotEx_Task(name="ssvm-backup-theirs", description="by hand", memory=False)
        it._connection.finish(theirs, 60)
        found = [each for each in session.leftovers() if each.vm == vm.machine.id]
        assert [(each.job_id, each.snapshot.moref) for each in found] == [("dead-job", made.moref)]
        assert f"{vm.machine.path.rpartition('/')[2]}" == found[0].vm_name
        it.remove_snapshot(found[0].snapshot)


def test_old_leftovers(bench: Bench, vm: TestVM, doctor: Callable[..., Any]) -> None:
    """``ssvm doctor`` warns of a snapshot of ours that is older than a day."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        it = session.find_vm(vm.machine.id)
        made = it.make_snapshot("old-job")
        assert doctor()[1]["snapshots"] == "ok"
        bench.vcenter.age_snapshots(vm.machine.id, days=2)
        assert doctor()[1]["snapshots"] == "warning"
        it.remove_snapshot(made)
