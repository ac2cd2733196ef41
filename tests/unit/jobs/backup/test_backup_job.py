"""The backup job on a real vCenter API: the backup is complete or absent, and the job leaves nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ssvm_worker.artifacts.manifest import find_manifest, read_manifest
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.errors import (
    Cancelled,
    IncompleteBackup,
    InvalidRequest,
    Retryable,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
)
from ssvm_worker.jobs.attempt import Progress
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.units import KiB
from ssvm_worker.vmware.session import VCenterSession
from tests.backup_bench import PREFIX, Bench, assert_whole
from tests.images import stream_optimized
from tests.neighbours import missing
from tests.servers.vcenter import TestVM, address_of, make_vm


def test_two_disks(bench: Bench, vm: TestVM) -> None:
    """A VM's disks are stored as the host sends them, and the job removes its own snapshot."""
    result = bench.run(vm)
    assert_whole(bench.primary, *vm.streams)
    assert result["snapshot_removed"] is True
    assert result["complete"] is True
    assert result["virtual_size"] == sum(map(len, vm.raws))
    assert [each["status"] for each in result["disks"]] == ["exported", "exported"]


@pytest.mark.plain_vcenter  # other vCenters need more calls
def test_calls(bench: Bench) -> None:
    """A backup of three disks makes at most 80 calls of vCenter, besides those whose number depends on the time."""
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, 64 * KiB)
    before = bench.vcenter.state()["calls"]
    bench.run(vm)
    made = {name: number - before.get(name, 0) for name, number in bench.vcenter.state()["calls"].items()}
    assert sum(made.values()) - made["WaitForUpdatesEx"] - made.get("HttpNfcLeaseProgress", 0) <= 80


def test_content(bench: Bench, vm: TestVM, tmp_path: Path) -> None:
    """qemu-img finds the stored disk identical to its source."""
    if shutil.which("qemu-img") is None:
        missing("qemu-img", "apt-get install qemu-utils")
    bench.run(vm)
    for number, raw in enumerate(vm.raws):
        stored, made = tmp_path / f"{number}.vmdk", tmp_path / f"{number}.raw"
        stored.write_bytes(read_bytes(bench.primary, f"{PREFIX}/b1-disk{number}.vmdk"))
        made.write_bytes(raw)
        command = ["qemu-img", "compare", "-f", "vmdk", "-F", "raw", str(stored), str(made)]
        assert "identical" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_descriptor_and_checksums(bench: Bench, vm: TestVM) -> None:
    """The server's OVF describes the snapshot with the counted sizes, and the .mf has each file's digest."""
    result = bench.run(vm)
    ovf = read_bytes(bench.primary, f"{PREFIX}/b1.ovf").decode()
    sizes = {key.rpartition("}")[2]: value for key, value in next(ElementTree.fromstring(ovf).iter(FILE)).items()}
    assert (sizes["href"], sizes["size"]) == ("b1-disk0.vmdk", str(len(vm.streams[0])))
    assert f"of {result['snapshot']}<" in ovf
    for line in read_bytes(bench.primary, f"{PREFIX}/b1.mf").decode().splitlines():
        name, digest = line.removeprefix("SHA256(").split(")= ")
        assert hashlib.sha256(read_bytes(bench.primary, f"{PREFIX}/{name}")).hexdigest() == digest


FILE = "{http://schemas.dmtf.org/ovf/envelope/1}File"


def test_config(bench: Bench, vm: TestVM) -> None:
    """The snapshot's whole configuration is stored as JSON."""
    bench.run(vm)
    config = json.loads(read_bytes(bench.primary, f"{PREFIX}/b1.config.json"))
    assert config["instanceUuid"] == vm.machine.instance_uuid


@pytest.mark.parametrize("name", ["id", "instance_uuid", "path"])
def test_names_of_a_vm(bench: Bench, vm: TestVM, name: str) -> None:
    """A VM is found by its managed object id, its instance UUID and its inventory path."""
    bench.run(vm, vm=getattr(vm.machine, name))
    assert_whole(bench.primary, *vm.streams)


@pytest.mark.parametrize("name", ["vm-99999", "00000000-1111-2222-3333-444444444444", "/DC0/vm/nobody"])
def test_unknown_vm(bench: Bench, vm: TestVM, name: str) -> None:
    """The error of a missing VM says how it was searched."""
    error = bench.fail(vm, vm=name)
    assert isinstance(error, SourceNotFound)
    assert name in str(error)
    assert not bench.left()


def test_chosen_disks(bench: Bench, vm: TestVM) -> None:
    """A disk is selected by key, label or position, and the result lists the others as left out."""
    for wanted in (str(vm.machine.disks[1].key), vm.machine.disks[1].label, "scsi0:1"):
        bench.primary = MemoryStore("primary")
        result = bench.run(vm, disks=[wanted])
        assert_whole(bench.primary, vm.streams[1])
        assert [each["status"] for each in result["disks"]] == ["left out", "exported"]
        assert result["complete"] is False


def test_unknown_disk(bench: Bench, vm: TestVM) -> None:
    """The error of a missing disk lists the existing ones, and no snapshot is made."""
    before = bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
    error = bench.fail(vm, disks=["Hard disk 7"])
    assert isinstance(error, InvalidRequest)
    assert vm.machine.disks[0].label in str(error)
    assert bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0) == before
    assert not bench.left()


@pytest.mark.parametrize(("mode", "status"), [("independent_persistent", "independent"), ("rdm", "rdm")])
def test_disks_outside_snapshots(bench: Bench, mode: str, status: str) -> None:
    """A disk outside the snapshot is always reported."""
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, modes=("persistent", mode))
    assert isinstance(bench.fail(vm, disks=["scsi0:1"]), InvalidRequest)
    for _ in range(2):  # the same request does not succeed the second time either
        error = bench.fail(vm)
        assert isinstance(error, IncompleteBackup)
        assert f"(scsi0:1) is {status}: no snapshot contains it" in error.what
    facts = read_manifest(bench.primary, bench.request(vm).artifact).facts
    assert [each["status"] for each in facts["disks"]] == ["exported", status]
    assert facts["complete"] is False
    assert_whole(bench.primary, vm.streams[0])


def test_disks_outside_snapshots_left_out(bench: Bench) -> None:
    """A backup of only the requested disks succeeds, even if other disks exist."""
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, modes=("persistent", "independent_persistent"))
    assert [each["status"] for each in bench.run(vm, disks=["scsi0:0"])["disks"]] == ["exported", "independent"]
    assert_whole(bench.primary, vm.streams[0])


def test_given_snapshot(bench: Bench, vm: TestVM) -> None:
    """A user's snapshot, by id or name, is used and never removed."""
    with VCenterSession(address_of(bench.vcenter)) as session:
        theirs = session.find_vm(vm.machine.id)
        snapshot = theirs.make_snapshot("theirs")
        for name in (snapshot.moref, snapshot.name):
            bench.primary = MemoryStore("primary")
            assert bench.run(vm, snapshot=name)["snapshot_removed"] is None
            assert_whole(bench.primary, *vm.streams)
        bench.vcenter.fault(calls={"ExportSnapshot": "NoPermission"})
        bench.fail(vm, snapshot=snapshot.moref, disks=["scsi0:0"])
        left = theirs.own_snapshot("theirs")
        assert left
        assert left.moref == snapshot.moref
        theirs.remove_snapshot(snapshot)


def test_unknown_snapshot(bench: Bench, vm: TestVM) -> None:
    """The error of a missing snapshot lists the existing ones."""
    assert "There are: none" in str(bench.fail(vm, snapshot="before-upgrade"))


@pytest.mark.parametrize(("fault", "tries"), [("TaskInProgress", 7), ("NoPermission", 2)])
def test_removal_of_a_busy_snapshot(bench: Bench, vm: TestVM, fault: str, tries: int) -> None:
    """The removal is tried again while another task holds the VM, and at most once more after other faults."""
    calls = bench.vcenter.state()["calls"].get("RemoveSnapshot_Task", 0)
    bench.vcenter.fault(calls={"RemoveSnapshot_Task": {"fault": fault, "times": tries - 1}})
    assert bench.run(vm)["snapshot_removed"] is True
    assert bench.vcenter.state()["calls"]["RemoveSnapshot_Task"] == calls + tries


def test_removal_after_a_failure(bench: Bench, vm: TestVM) -> None:
    """The clean-up of a failed job tries again for a minute while another task holds the VM."""
    busy = {"fault": "TaskInProgress", "times": 4}
    bench.vcenter.fault(calls={"ExportSnapshot": "NoPermission", "RemoveSnapshot_Task": busy})
    attempt = bench.attempt()
    with pytest.raises(SourceDenied):
        backup.run(bench.request(vm), attempt)
    backup.discard(bench.request(vm), attempt)
    assert not bench.left()


@pytest.mark.plain_vcenter  # a vCenter may not quiesce
def test_not_quiesced(bench: Bench, vm: TestVM) -> None:
    """If a guest cannot be quiesced, the backup is crash-consistent, and the result says so."""
    assert bench.run(vm)["quiesced"] is True
    bench.primary = MemoryStore("primary")
    bench.vcenter.fault(quiesce_task="ApplicationQuiesceFault")
    assert bench.run(vm)["quiesced"] is False
    manifest = find_manifest(bench.primary, bench.request(vm).artifact)
    assert manifest is not None
    assert "ApplicationQuiesceFault" in manifest.source["snapshot"]["remark"]


def test_two_stores(bench: Bench, vm: TestVM) -> None:
    """Every store gets the whole backup in one pass."""
    assert bench.run(vm, stores=["primary", "archive"])["owed"] == {}
    assert_whole(bench.primary, *vm.streams)
    assert_whole(bench.archive, *vm.streams)
    gets = [each for each in bench.vcenter.state()["gets"] if not each.get("refused")][-2:]
    sizes = {f"disk-{number}.vmdk": len(stream) for number, stream in enumerate(vm.streams)}
    assert {each["file"]: each["bytes"] for each in gets} == sizes


def test_owed(bench: Bench, vm: TestVM) -> None:
    """A failing secondary store is reported as owed, has no part of the backup, and does not affect the primary."""
    bench.archive = MemoryStore("archive", capacity=len(vm.streams[0]) + 100 * KiB)
    result = bench.run(vm, stores=["primary", "archive"])
    assert list(result["owed"]) == ["archive"]
    assert_whole(bench.primary, *vm.streams)
    assert not list(bench.archive.list())


def test_primary_fails(bench: Bench, vm: TestVM) -> None:
    """A failure of the primary store fails the job."""
    bench.primary = MemoryStore("primary", capacity=1000)
    bench.fail(vm, stores=["primary", "archive"])
    assert not bench.left()


def test_again(bench: Bench, vm: TestVM) -> None:
    """A repeated request gives the first result, and another request under the same id is refused."""
    first = bench.run(vm)
    before = bench.vcenter.state()["gets"]
    second = bench.run(vm)
    assert (second["objects"], second["reused"]) == (first["objects"], True)
    assert bench.vcenter.state()["gets"] == before
    with pytest.raises(InvalidRequest, match="another backup"):
        bench.run(vm, disks=["scsi0:0"])


def test_cancel(bench: Bench, vm: TestVM) -> None:
    """A cancel in the middle of a stream leaves nothing."""
    bench.vcenter.fault(get={"file": "disk-1.vmdk", "do": "stall", "at": 100_000})
    before = bench.fetches("disk-1.vmdk")
    bench.attempt_fields["stop_reason"] = lambda: "user" if bench.fetches("disk-1.vmdk") > before else None
    with pytest.raises(Cancelled):
        bench.run(vm)
    bench.vcenter.fault()
    backup.discard(bench.request(vm), bench.attempt())
    assert not bench.left()


def test_esx(esx: VCenterSimulator) -> None:
    """A standalone host, whose lease has ``*`` as address, works like a vCenter with the worker's OVF."""
    bench, vm = Bench(esx), make_vm(esx, 128 * KiB)
    bench.run(vm)
    assert_whole(bench.primary, *vm.streams)
    manifest = read_manifest(bench.primary, bench.request(vm).artifact)
    assert manifest.facts["descriptor"].startswith("our own")
    assert not bench.vcenter.state()["snapshots"]


def test_retryable(bench: Bench, vm: TestVM) -> None:
    """A temporary error says that a retry may help."""
    bench.vcenter.fault(calls={"ExportSnapshot": "TaskInProgress"})
    assert isinstance(bench.fail(vm), Retryable)


def test_file_store(bench: Bench, vm: TestVM, tmp_path: Path) -> None:
    """A directory store has the backup in CloudStack's layout, and parts of a killed attempt are deleted."""
    store = FileStore("primary", tmp_path)
    store.writer(f"{PREFIX}/b1-disk0.vmdk", owner=Owner("dead-job")).write(b"left behind")
    bench.primary = store
    bench.run(vm)
    files = {path.name for path in (tmp_path / PREFIX).iterdir()}
    assert files == {"b1.ovf", "b1.mf", "b1.config.json", "b1-disk0.vmdk", "b1-disk1.vmdk", "manifest.json"}
    assert (tmp_path / PREFIX / "b1-disk1.vmdk").read_bytes() == vm.streams[1]
    bench.primary = MemoryStore("primary")


def test_progress(bench: Bench, vm: TestVM) -> None:
    """Progress counts bytes of the disks, not of the stream, and ends at their sum."""
    attempt = bench.attempt()
    seen: list[dict[str, object]] = []
    attempt.progress = Progress(lambda each: seen.append(each | {"now": attempt.progress.bytes}), every_s=0)
    backup.run(bench.request(vm), attempt)
    exported = [each for each in seen if str(each["stage"]).startswith("exporting")]
    assert {each["total"] for each in exported} == {sum(map(len, vm.raws))}
    assert exported[-1]["bytes"] == sum(map(len, vm.raws))


@pytest.mark.plain_vcenter  # the job inflates each grain if the lease manifest differs
@pytest.mark.parametrize(("every", "expected"), [(0, None), (1, SourceUnavailable)])
def test_corrupt_grain(bench: Bench, vm: TestVM, every: int, expected: type[Exception] | None) -> None:
    """With inflate_every a damaged grain is found, which the structure alone does not reveal."""
    damaged = bytearray(vm.streams[0])
    damaged[64 * KiB + 4000] ^= 0xFF
    bench.vcenter.upload(vm.machine.disks[0].file, bytes(damaged))
    bench.options = bench.options.model_copy(update={"inflate_every": every})
    error = bench.fail(vm)
    assert type(error) is (expected or type(None))
    bench.vcenter.fault()


def test_another_disk_than_the_snapshots(bench: Bench, vm: TestVM) -> None:
    """A stream whose capacity differs from the snapshot's disk is refused."""
    bench.vcenter.upload(vm.machine.disks[0].file, stream_optimized(bytes(64 * KiB)))
    error = bench.fail(vm)
    assert isinstance(error, SourceUnavailable)
    assert not bench.left()
