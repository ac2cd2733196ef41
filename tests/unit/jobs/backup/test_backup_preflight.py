"""Checks before a backup: fatal problems stop it before any change, and others are warnings."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.cli import main
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.errors import (
    Cancelled,
    InvalidRequest,
    Permanent,
    ResourceBusy,
    Retryable,
    SourceDenied,
    SourceUnavailable,
    StoreFull,
)
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import StoreUsage
from ssvm_worker.units import KiB
from ssvm_worker.vmware.preflight import (
    PRIVILEGES,
    RESTORE_PRIVILEGES,
    SNAPSHOT_PRIVILEGES,
    PreflightFinding,
)
from ssvm_worker.vmware.session import VCenterSession
from tests.backup_bench import Bench, assert_whole
from tests.faults import store_unreachable
from tests.neighbours import ROOT
from tests.servers.vcenter import TestVM, address_of, make_vm

# Each test states the findings for one vCenter.
pytestmark = pytest.mark.plain_vcenter

#: The privilege of QueryChangedDiskAreas.
DISK_READ = "VirtualMachine.Provisioning.DiskRandomRead"

NEEDED = [each for ids in (PRIVILEGES | SNAPSHOT_PRIVILEGES).values() for each in ids]
NEEDED_TO_RESTORE = [each for steps in RESTORE_PRIVILEGES.values() for ids in steps.values() for each in ids]

REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    **{f"lacks {each}": ({"lacks": [each]}, SourceDenied, each) for each in NEEDED},
    "the host has another certificate": ({"host_thumbprint": "AB:" * 19 + "AB"}, SourceDenied, "not trusted"),
    "the host's name is unknown": ({"host": "esx7.invalid:443"}, SourceUnavailable, "esx7.invalid"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(bench: Bench, vm: TestVM, name: str) -> None:
    """A problem that would end the backup later ends it at once, is named, and no snapshot is made."""
    fault, expected, told = REFUSALS[name]
    before = bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
    bench.vcenter.fault(**fault)
    error = bench.fail(vm)
    assert isinstance(error, expected)
    assert told in str(error)
    assert bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0) == before
    assert not bench.left()


OBSTACLES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a disk of several VMs": ({"states": ["multi_writer"]}, InvalidRequest, "multi-writer"),
    "a bus of several VMs": ({"states": ["shared_bus"]}, InvalidRequest, "shares its bus (physicalSharing)"),
    "a secondary for fault tolerance": ({"states": ["ft_secondary"]}, InvalidRequest, "secondary"),
    "too many snapshots": ({"levels": 32}, InvalidRequest, "32 snapshots"),
    "locked snapshots": ({"states": ["locked"]}, ResourceBusy, "locked"),
    "disabled by another program": ({"states": ["disabled"]}, ResourceBusy, "CreateSnapshotEx_Task"),
    "a disconnected host": ({"states": ["disconnected"]}, SourceUnavailable, "disconnected"),
    "several": ({"states": ["multi_writer", "disabled"]}, InvalidRequest, "CreateSnapshotEx_Task"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacle(bench: Bench, name: str) -> None:
    """A state in which vSphere makes no snapshot ends the backup before one is requested, with object and remedy."""
    about, expected, told = OBSTACLES[name]
    vm = make_vm(bench.vcenter, 64 * KiB, **about)
    before = bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
    error = bench.fail(vm)
    assert isinstance(error, expected)
    assert told in error.what
    assert (error.where, bool(error.remedy)) == (vm.machine.id, True)
    assert bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0) == before


def test_host_in_maintenance(bench: Bench, vm: TestVM) -> None:
    """A host in maintenance mode is a temporary error, because vSphere may start no task there."""
    bench.vcenter.fault(host_maintenance=True)
    assert isinstance(bench.fail(vm), ResourceBusy)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("state", ["ft_primary", "managed", "passthrough"])
def test_possible_obstacle(bench: Bench, state: str, refused: bool) -> None:
    """A state in which vSphere may make no snapshot is a warning, and a permanent error if vSphere makes none."""
    vm = make_vm(bench.vcenter, 64 * KiB, states=[state])
    bench.vcenter.fault(snapshot_task="NotSupported" if refused else "")
    if refused:
        assert isinstance(bench.fail(vm), InvalidRequest)
    else:
        assert [each["check"] for each in bench.run(vm)["warnings"]] == ["snapshot"]


@pytest.mark.parametrize(("levels", "state"), [(29, "ok"), (30, "warning"), (32, "error")])
def test_many_snapshots(bench: Bench, levels: int, state: str) -> None:
    """Nearly as many snapshots as vSphere allows are a warning, as many are an error."""
    with bench.session(make_vm(bench.vcenter, 64 * KiB, levels=levels)) as it:
        found = it.examine(it.hardware())
    assert [each.state for each in found if each.check == "snapshot"] == [state]


def test_no_obstacle(bench: Bench) -> None:
    """Neither the explicit value for an unshared disk, nor other disabled methods, are obstacles."""
    vm = make_vm(bench.vcenter, 64 * KiB, states=["no_sharing", "some_disabled"])
    assert bench.run(vm)["warnings"] == []


def chain(bench: Bench) -> str:
    """Return the host's certificate, followed by those of authorities."""
    leaf = bench.vcenter.ca_file.read_text()
    return leaf + "".join(ssl.DER_cert_to_PEM_cert(os.urandom(size)) for size in (900, 901, 902))


@pytest.mark.parametrize("form", ["certificate", "chain"])
def test_hosts_of_vsphere_9(bench: Bench, vm: TestVM, form: str) -> None:
    """A host with a certificate or a chain, and no thumbprint, is trusted by it in preflight and lease."""
    pem = chain(bench) if form == "chain" else bench.vcenter.ca_file.read_text()
    bench.address = {"ca_file": None, "thumbprint": bench.vcenter.thumbprint}
    bench.vcenter.fault(host=f"localhost:{bench.vcenter.port}", host_certificate=pem, certificate=pem, thumbprint="")
    assert bench.run(vm)["warnings"] == []


@pytest.mark.parametrize("right", ["certificate", "thumbprint"])
def test_both_fields(bench: Bench, vm: TestVM, right: str) -> None:
    """If a host has a certificate and a thumbprint, and only one of them is right, the host is trusted."""
    pem, print_ = bench.vcenter.ca_file.read_text(), bench.vcenter.thumbprint
    if right == "certificate":
        print_ = "AB" * 20
    else:
        pem = ssl.DER_cert_to_PEM_cert(os.urandom(900))
    bench.address = {"ca_file": None, "thumbprint": bench.vcenter.thumbprint}
    host = {"host": f"localhost:{bench.vcenter.port}", "host_certificate": pem, "host_thumbprint": print_}
    bench.vcenter.fault(**host, certificate=pem, thumbprint=print_)
    assert bench.run(vm)["warnings"] == []


def test_host_that_vcenter_does_not_know(bench: Bench, vm: TestVM) -> None:
    """A host without thumbprint and certificate is a warning, because the lease may name its certificate."""
    bench.address = {"ca_file": None, "thumbprint": bench.vcenter.thumbprint}
    bench.vcenter.fault(host=f"localhost:{bench.vcenter.port}", host_certificate="none")
    assert [each["check"] for each in bench.run(vm)["warnings"]] == ["ESXi host"]


@pytest.mark.parametrize("port", [True, False], ids=["with a port", "with the port of vCenter"])
def test_backup_network(bench: Bench, vm: TestVM, port: bool) -> None:
    """The settings may give another address for a host whose name is unknown here, for preflight and export."""
    bench.vcenter.fault(host=f"ESX7.invalid:{1 if port else bench.vcenter.port}")
    bench.address = {"hosts": {"esx7.invalid": f"127.0.0.1:{bench.vcenter.port}" if port else "127.0.0.1"}}
    assert bench.run(vm)["warnings"] == []
    assert_whole(bench.primary, *vm.streams)


def test_user_spelt_otherwise(bench: Bench, vm: TestVM) -> None:
    """A user whose spelling the server does not know has the session's privileges."""
    bench.vcenter.fault(lacks=["VApp.Export"], session_has=True)
    assert bench.run(vm)["warnings"] == []


def test_all_at_once(bench: Bench, vm: TestVM) -> None:
    """All problems are reported together, and the error is permanent if one of them is."""
    bench.vcenter.fault(lacks=["VApp.Export"], host="esx7.invalid:443")
    bench.primary = MemoryStore("primary", capacity=1000)
    error = bench.fail(vm)
    assert isinstance(error, Permanent)
    assert all(part in str(error) for part in ("VApp.Export", "esx7.invalid", "room on primary"))


def test_host_down(bench: Bench, vm: TestVM) -> None:
    """A host that does not answer is a temporary error."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        bench.vcenter.fault(host=f"127.0.0.1:{closed.getsockname()[1]}")
        assert isinstance(bench.fail(vm), Retryable)


def test_no_room(bench: Bench, vm: TestVM) -> None:
    """A full primary store stops the backup at its start; a full secondary is a warning, and owed."""
    bench.archive = MemoryStore("archive", capacity=1000)
    result = bench.run(vm, stores=["primary", "archive"])
    assert "room on archive" in [each["check"] for each in result["warnings"]]
    assert list(result["owed"]) == ["archive"]
    assert isinstance(bench.fail(vm, id="b2", stores=["archive"]), StoreFull)


def test_store_away(bench: Bench, vm: TestVM) -> None:
    """A primary store whose room is unknown stops the backup at its start, with a temporary error."""
    bench.primary = store_unreachable(MemoryStore("primary"), "usage")
    with pytest.raises(Retryable, match="room on primary"):
        bench.run(vm)
    bench.primary = MemoryStore("primary")
    assert not bench.left()


class CancelledStore(MemoryStore):
    """A store on which a worker's shutdown arrives while it is asked for its free space."""

    def usage(self) -> StoreUsage:
        raise Cancelled("shutdown")


@pytest.mark.parametrize("name", ["primary", "archive"])
def test_cancelled_in_a_check(bench: Bench, vm: TestVM, name: str) -> None:
    """A cancel that arrives in a check before the backup stays a cancel, and is no finding."""
    setattr(bench, name, CancelledStore(name))
    with pytest.raises(Cancelled):
        bench.run(vm, stores=["primary", "archive"])


WARNINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an independent disk": ({"modes": ("persistent", "independent_persistent")}, {}, "disks"),
    "a raw device": ({"modes": ("persistent", "rdm")}, {}, "disks"),
    "a virtual TPM": ({"tpm": True}, {}, "encryption"),
    "a device that OVF cannot describe": ({}, {"descriptor_warning": "OvfUnsupportedDeviceExport"}, "OVF descriptor"),
    "no descriptor": ({}, {"descriptor_error": "OvfUnsupportedDeviceExport"}, "OVF descriptor"),
    "privileges cannot be asked for": ({}, {"calls": {"HasUserPrivilegeOnEntities": "NoPermission"}}, "privileges"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warned(bench: Bench, name: str) -> None:
    """A warning is in the result and in the manifest, with a remedy."""
    about, fault, check = WARNINGS[name]
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, **about)
    bench.vcenter.fault(**fault)
    wanted = ["scsi0:0"] if check == "disks" else None  # without the disk outside the snapshot, as requested
    warnings = bench.run(vm, disks=wanted)["warnings"]
    assert [each["check"] for each in warnings] == [check]
    assert warnings[0]["remedy"]
    assert read_manifest(bench.primary, bench.request(vm).artifact).facts["warnings"] == warnings


def test_refused_description_of_secrets(bench: Bench) -> None:
    """A VM with a virtual TPM that the server refuses to describe is not tried."""
    vm = make_vm(bench.vcenter, 64 * KiB, tpm=True)
    bench.vcenter.fault(descriptor_error="OvfUnsupportedDeviceExport")
    assert isinstance(bench.fail(vm), SourceDenied)


def test_encrypted(bench: Bench) -> None:
    """An encrypted VM is refused before the snapshot, unless the request tries it: then vSphere decides."""
    vm = make_vm(bench.vcenter, 64 * KiB, encrypted=True)
    before = bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
    error = bench.fail(vm)
    assert isinstance(error, InvalidRequest)
    assert "The VM is encrypted" in error.what
    assert bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0) == before
    bench.vcenter.fault(calls={"ExportSnapshot": "NotSupported"})
    assert isinstance(bench.fail(vm, encrypted="try"), InvalidRequest)
    assert [each["check"] for each in bench.run(vm, encrypted="try")["warnings"]] == ["encryption"]


@pytest.mark.parametrize("fault", [{"license": "esxBasic"}, {"snapshot_task": "RestrictedVersion"}])
def test_free_esxi(esx: VCenterSimulator, fault: dict[str, str]) -> None:
    """The free ESXi is refused for its license: before the snapshot if the user may read it, else by the host."""
    bench = Bench(esx)
    vm = make_vm(esx, 64 * KiB)
    before = esx.state()["calls"].get("CreateSnapshotEx_Task", 0)
    esx.fault(**fault)
    error = bench.fail(vm)
    assert isinstance(error, SourceDenied)
    assert "license" in error.what
    assert (esx.state()["calls"].get("CreateSnapshotEx_Task", 0) == before) is ("license" in fault)
    assert bench.run(vm)["complete"] is True


def test_privileges_are_documented() -> None:
    """The documented roles have the privileges that the checks require, and no others."""
    for page, needed in (("backups", [*NEEDED, DISK_READ]), ("restore", NEEDED_TO_RESTORE)):
        text = (ROOT / f"docs/how-to/{page}.md").read_text()
        told = re.findall(r"`((?:System|VApp|VirtualMachine|Resource|Datastore|Network)\.[\w.]+)`", text)
        assert set(told) == set(needed)


@pytest.mark.parametrize("privilege", [each for each in NEEDED if not each.endswith("RemoveSnapshot")])
def test_privilege_that_nobody_may_query(bench: Bench, vm: TestVM, privilege: str) -> None:
    """If the user may not query privileges, vCenter's own refusal names the missing one."""
    bench.vcenter.fault(lacks=[privilege], calls={"HasUserPrivilegeOnEntities": "NoPermission"})
    error = bench.fail(vm)
    assert isinstance(error, SourceDenied)
    assert privilege in error.remedy
    assert not bench.left()


def test_refused_removal(bench: Bench, vm: TestVM, caplog: pytest.LogCaptureFixture) -> None:
    """A removal that vCenter refuses does not fail the stored backup, and the log names the missing privilege."""
    removal = "VirtualMachine.State.RemoveSnapshot"
    bench.vcenter.fault(lacks=[removal], calls={"HasUserPrivilegeOnEntities": "NoPermission"})
    assert bench.run(vm)["snapshot_removed"] is False
    assert removal in caplog.text
    bench.vcenter.fault()
    assert bench.run(vm)["snapshot_removed"] is True


def test_refused_descriptor(bench: Bench, vm: TestVM) -> None:
    """If vCenter refuses only the OVF descriptor, the worker writes its own and records the reason."""
    bench.vcenter.fault(calls={"CreateDescriptor": "NoPermission"})
    assert [each["check"] for each in bench.run(vm)["warnings"]] == ["OVF descriptor"]
    facts = read_manifest(bench.primary, bench.request(vm).artifact).facts
    assert "our own: the server failed: NoPermission" in facts["descriptor"]


@pytest.mark.parametrize("lacks", [[DISK_READ], []])
def test_refused_changed_blocks(bench: Bench, lacks: list[str]) -> None:
    """Without the privilege to query changed blocks, the manifest names it, and the backup is complete."""
    vm = make_vm(bench.vcenter, 64 * KiB, change_id="52 de/1")
    bench.run(vm, mode="incremental", id="b1")
    bench.vcenter.change(vm.machine, vm.machine.disks[0], "52 de/2")
    bench.vcenter.fault(lacks=lacks)
    [disk] = bench.run(vm, mode="incremental", id="b2")["disks"]
    assert (DISK_READ in disk["cbt"]) is bool(lacks)


def test_given_snapshot(bench: Bench, vm: TestVM) -> None:
    """A backup of a given snapshot needs no privilege to make or remove one."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        theirs = session.find_vm(vm.machine.id)
        snapshot = theirs.make_snapshot("theirs")
        bench.vcenter.fault(lacks=["VirtualMachine.State.CreateSnapshot", "VirtualMachine.State.RemoveSnapshot"])
        bench.run(vm, snapshot=snapshot.moref)
        bench.vcenter.fault()
        theirs.remove_snapshot(snapshot)
    assert_whole(bench.primary, *vm.streams)


#: The checks of a vCenter, without a VM.
OF_A_VCENTER = ("privileges", "ESXi host", "snapshots", "consolidation")


@pytest.fixture
def doctor(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run ``ssvm doctor --vcenter vc1``, and return its exit status and the worst state of each check."""
    address = address_of(bench.vcenter)
    for name in ("host", "port", "username", "password", "ca_file"):
        monkeypatch.setenv(f"SSVM_VCENTERS__VC1__{name.upper()}", str(getattr(address, name)))
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", "file:///tmp")

    def run(*argv: str) -> tuple[int, dict[str, str]]:
        status = main(["doctor", "--vcenter", "vc1", "--json", *argv])
        rows = json.loads(capsys.readouterr().out)
        return status, {row["check"]: row["state"] for row in sorted(rows, key=lambda row: not row["ok"])}

    return run


def test_doctor(doctor: Callable[..., Any], bench: Bench, vm: TestVM) -> None:
    """``ssvm doctor`` shows the findings of a backup of any VM, or of one, and an error fails it."""
    assert doctor() == (0, dict.fromkeys(OF_A_VCENTER, "ok"))
    status, found = doctor("--vm", vm.machine.path)
    assert (status, found["OVF descriptor"], found["disks"]) == (0, "ok", "ok")
    bench.vcenter.fault(lacks=["VApp.Export"])
    status, found = doctor("--vm", vm.machine.id)
    assert (status, found["privileges"], found["room on primary"]) == (1, "failed", "ok")
    # The role of a tenant may be on a folder, so a lack at the root is only a warning.
    status, found = doctor()
    assert (status, found["privileges"]) == (0, "warning")


def test_doctor_of_a_restore(doctor: Callable[..., Any], bench: Bench) -> None:
    """``ssvm doctor --restore`` checks the privileges and the hosts of a restore, and names what is missing."""
    place = ("--restore", "--pool", "DC0_C0", "--datastore", "LocalDS_0", "--network", "VM Network")
    assert doctor(*place) == (0, {"privileges": "ok", "ESXi host": "ok"})
    for privilege in ("Resource.AssignVMToPool", "Network.Assign"):
        bench.vcenter.fault(lacks=[privilege])
        assert doctor(*place) == (1, {"privileges": "failed", "ESXi host": "ok"})
    bench.vcenter.fault(host="esx7.invalid:443")
    assert doctor(*place)[1]["ESXi host"] == "failed"
    assert main(["doctor", "--vcenter", "vc1", "--pool", "DC0_C0"]) == 2


def test_of_a_vcenter(bench: Bench, vm: TestVM) -> None:
    """Without a VM, the checks cover the user's privileges at the root, and the connection to each host."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        found: list[PreflightFinding] = session.examine()
    states = {each.check: each.state for each in found}
    states.pop("consolidation")  # other tests leave VMs that need it
    assert states == {"privileges": "ok", "ESXi host": "ok", "snapshots": "ok"}
    assert sum(each.check == "ESXi host" for each in found) == 4


def test_leftovers(bench: Bench, vm: TestVM) -> None:
    """Snapshots that ended jobs left are found anywhere, and foreign snapshots are ignored."""
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
    """``ssvm doctor`` warns of the worker's snapshots that are older than a day."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        it = session.find_vm(vm.machine.id)
        made = it.make_snapshot("old-job")
        assert doctor()[1]["snapshots"] == "ok"
        bench.vcenter.age_snapshots(vm.machine.id, days=2)
        assert doctor()[1]["snapshots"] == "warning"
        it.remove_snapshot(made)
