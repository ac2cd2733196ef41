"""The backup job under every fault: the backup is complete or absent, and the job leaves nothing."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import pytest

from ssvm_worker.artifacts.manifest import find_manifest, read_manifest
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.errors import (
    Cancelled,
    IncompleteBackup,
    InvalidRequest,
    LeaseLost,
    Permanent,
    ResourceBusy,
    Retryable,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    StoreFull,
    WorkerError,
)
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.jobs.restore.backup_reader import read_backup
from ssvm_worker.stores.memory import MemorySink, MemoryStore
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.units import KiB
from ssvm_worker.vmware.session import VCenterSession
from tests.backup_bench import FAST, Bench, assert_whole
from tests.servers.vcenter import TestVM, address_of, make_vm
from tests.servers.wire import Wire
from tests.waiting import CLAIM_S

STREAM_FAULTS = {
    "the stream is cut before its first byte": ({"do": "cut", "at": 0}, SourceUnavailable),
    "the stream is cut in the middle": ({"do": "cut", "at": 300_000}, SourceUnavailable),
    "the stream is cut in its last sector": ({"do": "cut", "at": -100}, SourceUnavailable),
    "a 200 with an empty body": ({"do": "end", "at": 0}, SourceUnavailable),
    "a 200 that ends properly in the middle": ({"do": "end", "at": 300_000}, SourceUnavailable),
    "a 200 that ends properly without its end marker": ({"do": "end", "at": -512}, SourceUnavailable),
    "the lease expires in the middle": ({"do": "expire", "at": 300_000}, Retryable),
    "status 503": ({"status": 503}, SourceUnavailable),
    "status 404": ({"status": 404}, LeaseLost),
}


def get_fault(vm: TestVM, file: str, fault: dict[str, Any], times: int) -> dict[str, Any]:
    """Return a fault of the second disk's stream; an offset below 0 counts from its end."""
    at = fault.get("at", 0)
    return fault | {"file": file, "times": times, "at": at if at >= 0 else len(vm.streams[1]) + at}


@pytest.mark.parametrize("name", STREAM_FAULTS)
def test_stream_fails(bench: Bench, vm: TestVM, name: str) -> None:
    """A stream that fails each time fails the job with a temporary error, and nothing is stored."""
    fault, expected = STREAM_FAULTS[name]
    bench.vcenter.fault(get=get_fault(vm, "disk-1.vmdk", fault, times=0))
    assert isinstance(bench.fail(vm, stores=["primary", "archive"]), expected)
    assert not bench.left()


@pytest.mark.parametrize("name", STREAM_FAULTS)
def test_stream_fails_once(bench: Bench, vm: TestVM, name: str) -> None:
    """A stream that fails once is fetched again with a new lease, and the backup is complete."""
    bench.vcenter.fault(get=get_fault(vm, "disk-1.vmdk", STREAM_FAULTS[name][0], times=1))
    before = bench.fetches("disk-0.vmdk"), bench.fetches("disk-1.vmdk")
    bench.run(vm, stores=["primary", "archive"])
    assert_whole(bench.primary, *vm.streams)
    assert_whole(bench.archive, *vm.streams)
    fetched = (bench.fetches("disk-0.vmdk") - before[0], bench.fetches("disk-1.vmdk") - before[1])
    assert fetched == (bench.leases, bench.leases + 1)


FAULTS: dict[str, tuple[dict[str, Any], type[WorkerError]]] = {
    "the lease ends in an error": ({"lease_error": "Timedout"}, LeaseLost),
    "another task holds the VM": ({"calls": {"ExportSnapshot": "TaskInProgress"}}, ResourceBusy),
    "no privilege to export": ({"calls": {"ExportSnapshot": "NoPermission"}}, SourceDenied),
    "the session ends": ({"calls": {"ExportSnapshot": "NotAuthenticated"}}, SourceUnavailable),
    "the snapshot cannot be made": ({"snapshot_task": "InsufficientResourcesFault"}, SourceUnavailable),
    "an answer that pyVmomi does not know": ({"unknown_fault": "CreateSnapshotEx_Task"}, SourceUnavailable),
    **{
        f"the snapshot meets {fault}": ({"snapshot_task": fault}, expected)
        for fault, expected in {
            "NotSupported": InvalidRequest,
            "RestrictedVersion": SourceDenied,
            "NotEnoughLicenses": SourceDenied,
            "NoDiskSpace": StoreFull,
            "TooManySnapshotLevels": InvalidRequest,
            "MethodDisabled": ResourceBusy,
            "SystemError": SourceUnavailable,
            "HostCommunication": SourceUnavailable,
        }.items()
    },
    "vCenter lacks a property": ({"calls": {"ExportSnapshot": "InvalidProperty"}}, InvalidRequest),
    "the export is not supported": ({"calls": {"ExportSnapshot": "NotSupported"}}, InvalidRequest),
    "the export meets an unsupported device": (
        {"calls": {"ExportSnapshot": "OvfUnsupportedDeviceExport"}},
        InvalidRequest,
    ),
    "the license allows no export": ({"calls": {"ExportSnapshot": "RestrictedVersion"}}, SourceDenied),
    "no privilege to make it": ({"calls": {"CreateSnapshotEx_Task": "NoPermission"}}, SourceDenied),
    "the host shows another certificate": ({"thumbprint": "11:" * 19 + "11"}, SourceDenied),
    "status 403, with and without a cookie": ({"get": {"status": 403}}, SourceDenied),
}


@pytest.mark.plain_vcenter  # each fault has one error
@pytest.mark.parametrize("name", FAULTS)
def test_vcenter_fails(bench: Bench, vm: TestVM, name: str) -> None:
    """A refusal by vCenter is a clear error, and nothing is left on the stores or on the VM."""
    fault, expected = FAULTS[name]
    bench.vcenter.fault(**fault)
    error = bench.fail(vm)
    assert isinstance(error, expected)
    assert error.what
    assert error.where
    assert not bench.left()


@pytest.mark.plain_vcenter  # keys without a place do not show which disk is missing
@pytest.mark.parametrize("mode", ["full", "incremental"])
def test_lease_lists_too_few_files(bench: Bench, mode: str) -> None:
    """A backup without an unlisted disk is stored, names the disk and the reason, and does not succeed."""
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, 64 * KiB)
    bench.vcenter.fault(omit="disk-1.vmdk")
    error = bench.fail(vm, mode=mode, stores=["primary", "archive"])
    assert isinstance(error, IncompleteBackup)
    assert "(scsi0:1) is missing: the host offers no file for it; it offers: " in error.what
    assert error.result
    assert (error.result["stores"], error.result["owed"]) == (["primary", "archive"], {})
    facts = read_manifest(bench.archive, bench.request(vm).artifact).facts
    assert [each["status"] for each in facts["disks"]] == ["exported", "missing", "exported"]
    assert (facts["complete"], facts["virtual_size"]) == (False, 128 * KiB)
    disks = read_backup(bench.attempt(), bench.archive, bench.request(vm).artifact)
    assert [b"".join(each.image("raw", "x")) for each in disks] == [vm.raws[0], vm.raws[2]]
    assert "ssvm-backup-job-1" not in bench.left()


def test_lease_lists_no_wanted_file(bench: Bench, vm: TestVM) -> None:
    """Nothing is stored if the host offers none of the requested disks."""
    bench.vcenter.fault(omit="disk-1.vmdk")
    error = bench.fail(vm, disks=["scsi0:1"])
    assert isinstance(error, SourceNotFound)
    assert "(scsi0:1): the host offers no file for it" in error.what
    assert not bench.left()


def test_lease_never_ready(bench: Bench, vm: TestVM) -> None:
    """A lease that is not ready in time is given up and released."""
    bench.options = FAST.model_copy(update={"lease_ready_s": 1, "lease_tries": 1})
    bench.vcenter.fault(never_ready=True)
    assert isinstance(bench.fail(vm), LeaseLost)
    assert not bench.left()


@pytest.mark.parametrize("fault", [{"get": {"do": "stall", "at": 300_000}}, {"hang": "ExportSnapshot"}])
def test_stall(bench: Bench, vm: TestVM, fault: dict[str, Any]) -> None:
    """A stalled stream or call is given up."""
    bench.options = FAST.model_copy(update={"lease_tries": 1})
    bench.address = {"timeout_s": 2.0, "stream_timeout_s": 2.0}
    bench.vcenter.fault(**fault)
    assert isinstance(bench.fail(vm), SourceUnavailable)
    assert not bench.left()


@pytest.mark.parametrize("method", ["Login", "CreateSnapshotEx_Task", "ExportSnapshot"])
def test_cancel_while_vcenter_hangs(bench: Bench, vm: TestVM, method: str) -> None:
    """A cancel takes effect while vCenter does not answer."""
    before = bench.vcenter.state()["calls"].get(method, 0)
    asked = lambda: bench.vcenter.state()["calls"].get(method, 0) > before  # noqa: E731
    bench.vcenter.fault(hang=method)
    bench.attempt_fields = {"stop_reason": lambda: "user" if asked() else None}
    assert isinstance(bench.fail(vm), Cancelled)
    assert not bench.left()


def test_needs_cookie(bench: Bench, vm: TestVM) -> None:
    """The session's cookie is sent to a host only after it refused a request without it."""
    bench.vcenter.fault(get={"needs_cookie": True})
    bench.run(vm, disks=["scsi0:0"])
    assert_whole(bench.primary, vm.streams[0])
    assert [each["cookie"] for each in bench.vcenter.state()["gets"][-2:]] == [False, True]


@pytest.mark.parametrize("fault", [{"any_host": True}, {"plain_keys": True}, {"thumbprint": ""}])
def test_other_leases(bench: Bench, vm: TestVM, fault: dict[str, Any]) -> None:
    """A lease may name any host, number its disks, and omit the thumbprint."""
    bench.vcenter.fault(**fault)
    bench.run(vm)
    assert_whole(bench.primary, *vm.streams)


def test_second_attempt(bench: Bench, vm: TestVM) -> None:
    """A second attempt reuses the first one's snapshot, and fetches only missing disks."""
    stores = ["primary", "archive"]
    bench.vcenter.fault(get={"file": "disk-1.vmdk", "do": "cut", "at": 1000})
    with pytest.raises(SourceUnavailable):
        backup.run(bench.request(vm, stores=stores), bench.attempt(will_resume=lambda _: True))
    bench.vcenter.fault()
    before = bench.fetches("disk-0.vmdk")
    assert bench.run(vm, stores=stores)["snapshot_removed"] is True
    assert bench.fetches("disk-0.vmdk") == before
    assert_whole(bench.primary, *vm.streams)
    assert_whole(bench.archive, *vm.streams)


def test_snapshot_lost_between_attempts(bench: Bench, vm: TestVM) -> None:
    """Disks of two snapshots are never mixed, so without the first snapshot all disks are fetched again."""
    bench.vcenter.fault(get={"file": "disk-1.vmdk", "do": "cut", "at": 1000})
    with pytest.raises(SourceUnavailable):
        backup.run(bench.request(vm), bench.attempt(will_resume=lambda _: True))
    bench.vcenter.fault()
    with VCenterSession(address_of(bench.vcenter)) as session:
        theirs = session.find_vm(vm.machine.id)
        snapshot = theirs.own_snapshot("job-1")
        assert snapshot is not None
        theirs.remove_snapshot(snapshot)
    before = bench.fetches("disk-0.vmdk")
    bench.run(vm)
    assert bench.fetches("disk-0.vmdk") == before + bench.leases
    assert_whole(bench.primary, *vm.streams)


def test_snapshot_not_removed(bench: Bench, vm: TestVM) -> None:
    """A snapshot that cannot be removed does not fail the backup, and the same job removes it later."""
    bench.vcenter.fault(calls={"RemoveSnapshot_Task": "TaskInProgress"})
    assert bench.run(vm)["snapshot_removed"] is False
    assert_whole(bench.primary, *vm.streams)
    bench.vcenter.fault()
    assert bench.run(vm)["snapshot_removed"] is True


def test_fenced(bench: Bench, vm: TestVM) -> None:
    """A worker without its claim commits nothing, and leaves the snapshot to the new owner."""

    def fenced() -> None:
        raise Cancelled("fenced")

    with pytest.raises(Cancelled):
        backup.run(bench.request(vm), bench.attempt(confirm=fenced))
    assert bench.vcenter.state()["snapshots"]
    assert not list(bench.primary.list())
    bench.run(vm)
    assert_whole(bench.primary, *vm.streams)


class SlowStore(MemoryStore):
    """A store that takes nothing until the lease was renewed twice."""

    def __init__(self, vcenter: VCenterSimulator) -> None:
        super().__init__("primary")
        self.vcenter = vcenter

    def writer(
        self,
        key: str,
        size_hint: int | None = None,
        *,
        owner: Owner,
        resume: bool = False,
        max_bytes: int | None = None,
        copy_from: Store | None = None,
    ) -> MemorySink:
        """Return a sink that waits."""
        if key.endswith(".vmdk"):
            leases = self.vcenter.state()["leases"].values
            while max(each["renewals"] for each in leases() if each["state"] == "open") < 2:
                leases = self.vcenter.state()["leases"].values
        return super().writer(key, size_hint, owner=owner, resume=resume, max_bytes=max_bytes)


@pytest.mark.parametrize("fault", ["", "SystemError", "HostCommunication"])
def test_keep_alive(bench: Bench, vm: TestVM, fault: str) -> None:
    """The lease is renewed while a store is slow, also after renewals that failed."""
    bench.primary = SlowStore(bench.vcenter)
    calls = {"HttpNfcLeaseProgress": {"fault": fault, "times": 2}} if fault else {}
    bench.vcenter.fault(lease_timeout=3 * math.ceil(CLAIM_S), calls=calls)
    bench.options = FAST.model_copy(update={"lease_tries": 1})
    bench.run(vm, disks=["scsi0:0"])
    assert_whole(bench.primary, vm.streams[0])


def test_lease_expires_unnoticed(bench: Bench, vm: TestVM) -> None:
    """A refused renewal ends the transfer, and the job takes another lease."""
    bench.options = FAST.model_copy(update={"lease_tries": 1})
    bench.vcenter.fault(lease_timeout=1, get={"do": "stall", "at": 300_000}, calls={"HttpNfcLeaseProgress": "Timedout"})
    error = bench.fail(vm)
    assert isinstance(error, LeaseLost)
    assert "ended the lease" in error.what
    assert not bench.left()


@pytest.mark.parametrize(
    "fault", [{"calls": {"HttpNfcLeaseProgress": "SystemError"}}, {"unknown_fault": "HttpNfcLeaseProgress"}]
)
def test_no_renewal_succeeds(bench: Bench, vm: TestVM, fault: dict[str, Any]) -> None:
    """If each renewal fails for the lease's whole time, the transfer ends with the reason."""
    bench.options = FAST.model_copy(update={"lease_tries": 1})
    bench.vcenter.fault(lease_timeout=1, get={"do": "stall", "at": 300_000}, **fault)
    error = bench.fail(vm)
    assert isinstance(error, LeaseLost)
    assert "No renewal of the lease succeeded" in error.what
    assert not bench.left()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ({"password": "wrong"}, SourceDenied),
        ({"ca_file": None}, SourceDenied),
        ({"thumbprint": "00" * 32}, SourceDenied),
        ({"host": "127.0.0.1", "port": 1}, SourceUnavailable),
    ],
    ids=["wrong password", "untrusted certificate", "another certificate than the pinned one", "unreachable"],
)
def test_no_session(bench: Bench, vm: TestVM, address: dict[str, Any], expected: type[WorkerError]) -> None:
    """Without a session the job fails before it changes anything."""
    bench.address = address
    assert isinstance(bench.fail(vm), expected)
    assert not bench.left()


@pytest.mark.parametrize("reached", [True, False])
def test_clean_up_without_vcenter(bench: Bench, vm: TestVM, caplog: pytest.LogCaptureFixture, reached: bool) -> None:
    """A clean-up that cannot log in warns of a snapshot only if the attempt could make one."""
    attempt = bench.attempt()
    bench.vcenter.fault(calls={"ExportSnapshot" if reached else "Login": "SystemError"})
    with pytest.raises(SourceUnavailable):
        backup.run(bench.request(vm), attempt)
    bench.vcenter.fault(calls={"Login": "SystemError"})
    backup.discard(bench.request(vm), attempt)
    assert ("may have left a snapshot" in caplog.text) is reached


def test_permanent_is_not_tried_again(bench: Bench, vm: TestVM) -> None:
    """A permanent refusal is not tried again with another lease."""
    bench.vcenter.fault(calls={"ExportSnapshot": "NoPermission"})
    before = bench.vcenter.state()["calls"].get("ExportSnapshot", 0)
    assert isinstance(bench.fail(vm, disks=["scsi0:0"]), Permanent)
    assert bench.vcenter.state()["calls"]["ExportSnapshot"] == before + 1
    assert find_manifest(bench.primary, bench.request(vm).artifact) is None


@pytest.mark.parametrize("method", ["CreateSnapshotEx_Task", "ExportSnapshot", "WaitForUpdatesEx"])
def test_connection_breaks(bench: Bench, vm: TestVM, method: str) -> None:
    """A broken connection during any call is a temporary error."""
    before = bench.vcenter.state()["calls"].get(method, 0)

    def break_it() -> None:
        if bench.vcenter.state()["calls"].get(method, 0) > before:
            wire.reset()
            bench.vcenter.fault(lease_timeout=2)

    bench.vcenter.fault(hang=method)
    with contextlib.closing(Wire(bench.vcenter.port)) as wire:
        bench.address = {"host": "127.0.0.1", "port": wire.port}
        bench.attempt_fields = {"stop_reason": break_it}
        assert isinstance(bench.fail(vm), Retryable)
        while bench.open_leases():
            time.sleep(0.1)  # its answer was lost, so it exists until its time-out
        assert not bench.left()


def test_cancel_removes_the_snapshot(bench: Bench, vm: TestVM) -> None:
    """A cancelled backup removes its snapshot, although each check says that it must stop."""
    made = lambda: "ssvm-backup-job-1" in bench.vcenter.state()["snapshots"]  # noqa: E731

    def confirm() -> None:
        if made():
            raise Cancelled("user")

    bench.attempt_fields = {"stop_reason": lambda: "user" if made() else None, "confirm": confirm}
    with pytest.raises(Cancelled):
        bench.run(vm)
    assert not bench.left()
