"""The backup job in incremental mode, on a real vCenter API: each backup restores alone, and stores only new grains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.config.schema import Settings
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.errors import CorruptImage
from ssvm_worker.formats.writers.vmdk import stream_optimized as image_of
from ssvm_worker.grain_store.reader import grain_maps
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.units import MiB
from tests.attempts import attempt
from tests.backup_bench import Bench
from tests.faults import store_failing
from tests.grain_bench import OWNER, changed, packs, restored
from tests.images import GRAIN, stream_optimized
from tests.servers.vcenter import TestVM, make_vm

NAMES: dict[str, Any] = {"kind": "backup", "account": "acme", "volume": "vol1"}


@pytest.fixture
def vm(vcenter: VCenterSimulator) -> TestVM:
    """Return a VM with one disk of 32 grains of noise."""
    vm = make_vm(vcenter, 32 * GRAIN)
    write(vcenter, vm, os.urandom(32 * GRAIN))
    return vm


def write(vcenter: VCenterSimulator, vm: TestVM, raw: bytes) -> None:
    """Write to the guest's disk."""
    vm.raws[0] = bytes(raw)
    vcenter.upload(vm.machine.disks[0].file, stream_optimized(bytes(raw)), vm.machine.datacenter)


def track(vcenter: VCenterSimulator, vm: TestVM, change_id: str, *grains: int) -> None:
    """Let changed block tracking report writes to those grains, up to that change id."""
    areas = [[place * GRAIN, GRAIN] for place in grains]
    vcenter.change(vm.machine, vm.machine.disks[0], change_id, areas)


def take(bench: Bench, vm: TestVM, id_: str, **fields: Any) -> dict[str, Any]:
    """Make an incremental backup."""
    return bench.run(vm, **{"mode": "incremental", "stores": ["primary", "archive"], "id": id_} | fields)


def found(store: MemoryStore, id_: str) -> Manifest:
    manifest = find_manifest(store, Artifact("backup", "acme", id_, "vol1"))
    assert manifest
    return manifest


def test_chain(bench: Bench, vm: TestVM) -> None:
    """Each backup of a chain restores its disk from every store, and stores only new grains."""
    raws, results = [], []
    for number in range(3):
        results.append(take(bench, vm, f"b{number}"))
        raws.append(vm.raws[0])
        write(bench.vcenter, vm, changed(vm.raws[0], number, seed=number))
    for store in (bench.primary, bench.archive):
        assert [restored(store, found(store, f"b{number}")) for number in range(3)] == raws
    assert [each["mode"] for each in results] == ["incremental"] * 3
    assert results[2]["new_bytes"] < results[0]["new_bytes"] / 20
    assert results[2]["reused_bytes"] > 30 * GRAIN


def test_verified(bench: Bench, vm: TestVM) -> None:
    """verify passes an incremental backup with its OVF and checksums, and then names a damaged pack."""
    take(bench, vm, "b1")
    request = verify.Request(id="b1", **NAMES)
    assert verify.run(request, attempt(bench.primary))["objects"] == 4
    (key,) = packs(bench.primary)
    data = bytearray(bench.primary.find(key).data)
    data[1000] ^= 1
    put_bytes(bench.primary, key, bytes(data), OWNER)
    with pytest.raises(CorruptImage, match=r"b1-disk0\.grains lacks LBA 0-127"):
        verify.run(request, attempt(bench.primary))


def test_deleted(bench: Bench, vm: TestVM) -> None:
    """When all full and incremental backups of a volume are deleted, no file of the volume is left."""
    take(bench, vm, "b1")
    take(bench, vm, "b2", mode="full")
    for id_ in ("b1", "b2"):
        delete.run(delete.Request(id=id_, stores=["primary", "archive"], **NAMES), bench.attempt())
    assert not bench.left()


def incremental(store: str) -> Settings:
    """Return settings in which backups to that store are incremental."""
    return config.parse({"stores": {store: {"url": "file:///x", "backup_mode": "incremental"}}}, "test")


def test_store_setting(bench: Bench, vm: TestVM) -> None:
    """The first store's setting applies if the request has none."""
    bench.attempt_fields = {"settings": incremental("primary")}
    assert take(bench, vm, "b1", mode=None)["mode"] == "incremental"
    assert take(bench, vm, "b2", mode="full")["mode"] == "full"
    bench.attempt_fields = {"settings": incremental("archive")}
    assert take(bench, vm, "b3", mode=None)["mode"] == "full"


def test_resource() -> None:
    """Jobs that write backups of one volume never run together, but those of two volumes may."""
    fields = {"vcenter": "vc1", "vm": "vm-1", "account": "acme"}
    one, two, other = (
        backup.resource(backup.Request(**fields, volume=volume, id=id_))
        for volume, id_ in (("vol1", "b1"), ("vol1", "b2"), ("vol2", "b1"))
    )
    assert one == two == delete.resource(delete.Request(id="b3", **NAMES)) != other


def test_bad_disk(bench: Bench, vm: TestVM) -> None:
    """A corrupt grain fails the backup, and no file is left."""
    stream = bytearray(stream_optimized(vm.raws[0]))
    stream[GRAIN + 5000] ^= 1
    bench.vcenter.upload(vm.machine.disks[0].file, bytes(stream), vm.machine.datacenter)
    error = bench.fail(vm, mode="incremental", stores=["primary", "archive"])
    assert error
    assert "inflated" in str(error)
    assert not bench.left()


def test_second_lease(bench: Bench, vm: TestVM) -> None:
    """A truncated stream is fetched again, and the backup is complete."""
    bench.vcenter.fault(get={"times": 1, "do": "cut", "at": 20 * GRAIN})
    take(bench, vm, "b1")
    assert restored(bench.primary, found(bench.primary, "b1")) == vm.raws[0]


def test_late_failure(bench: Bench, vm: TestVM) -> None:
    """After a lease that fails late, the next one stores no pack again, and the packs count as new."""
    bench.vcenter.fault(manifest="wrong")
    first = take(bench, vm, "b1")
    assert len(packs(bench.primary)) == 1
    assert first["new_bytes"] == sum(bench.primary.stat(each).size for each in packs(bench.primary))
    assert found(bench.primary, "b1").entries[0].facts["new_grains"] == 32
    assert (first["reused_bytes"], take(bench, vm, "b2")["new_bytes"]) == (0, 0)


def test_primary_fails(bench: Bench, vm: TestVM) -> None:
    """If the first store fails, the job fails, and nothing is left on any store."""
    whole = bench.primary
    bench.primary = store_failing(whole, 3 * GRAIN)
    assert bench.fail(vm, mode="incremental", stores=["primary", "archive"])
    bench.primary = whole
    assert not bench.left()


def test_archive_fails(bench: Bench, vm: TestVM) -> None:
    """If another store fails it is reported as owed, and its next backup is complete anyway."""
    whole = bench.archive
    bench.archive = store_failing(whole, 3 * GRAIN)
    assert "archive" in take(bench, vm, "b1")["owed"]
    bench.archive = whole
    assert not take(bench, vm, "b2")["owed"]
    assert restored(whole, found(whole, "b2")) == restored(bench.primary, found(bench.primary, "b1")) == vm.raws[0]


def test_spilled(bench: Bench, vm: TestVM, tmp_path: Path) -> None:
    """New packs use the scratch file, as whole streams do, if the settings have one."""
    bench.options = bench.options.model_copy(update={"spill_dir": tmp_path, "spill_bytes": MiB})
    take(bench, vm, "b1")
    for store in (bench.primary, bench.archive):
        assert restored(store, found(store, "b1")) == vm.raws[0]


def test_two_disks_at_once(bench: Bench) -> None:
    """Disks that are stored in parallel and share many grains are each restored correctly."""
    vm = make_vm(bench.vcenter, 20 * GRAIN, 20 * GRAIN)
    for disk, raw in zip(vm.machine.disks, (vm.raws[0], changed(vm.raws[0], 1, 5)), strict=True):
        bench.vcenter.upload(disk.file, stream_optimized(bytes(raw)), vm.machine.datacenter)
    bench.options = bench.options.model_copy(update={"parallel_disks": 2})
    take(bench, vm, "b1")
    manifest = found(bench.primary, "b1")
    assert [restored(bench.primary, manifest, number) for number in range(2)] == [vm.raws[0], changed(vm.raws[0], 1, 5)]


def verdict(result: dict[str, Any]) -> str:
    return str(result["disks"][0]["cbt"])


def test_cbt_agrees(bench: Bench, vm: TestVM) -> None:
    """Changed grains inside the changed areas agree with the tracking, up to the end of the disk."""
    track(bench.vcenter, vm, "52 a/1")
    assert verdict(take(bench, vm, "b1")).startswith("absent")
    write(bench.vcenter, vm, changed(vm.raws[0], 1, 31))
    track(bench.vcenter, vm, "52 a/2", 1, 5, 31)
    result = take(bench, vm, "b2")
    assert verdict(result) == "agrees"
    assert grain_maps(found(bench.primary, "b2"))[0].facts["change_id"] == "52 a/2"


def test_cbt_disagrees(bench: Bench, vm: TestVM) -> None:
    """A changed grain outside the changed areas is a remark in result and manifest, and is stored."""
    track(bench.vcenter, vm, "52 a/1")
    take(bench, vm, "b1")
    write(bench.vcenter, vm, changed(vm.raws[0], 4, 9))
    track(bench.vcenter, vm, "52 a/2", 4)
    result = take(bench, vm, "b2")
    assert verdict(result) == f"disagrees at LBA {9 * 128}-{10 * 128 - 1}"
    assert "changed block tracking" in result["remarks"][-1]
    assert restored(bench.primary, found(bench.primary, "b2")) == vm.raws[0]


@pytest.mark.parametrize("zeros", [True, False], ids=["sends zeros", "omits zeros"])
def test_cbt_of_zeros(bench: Bench, vm: TestVM, zeros: bool) -> None:
    """A host that sends an area of zeros in one backup and omits it in the next contradicts no tracking."""
    raw = bytes(vm.raws[0][: 20 * GRAIN]) + bytes(12 * GRAIN)
    extents = ((at, raw[at : at + GRAIN]) for at in range(0, len(raw), GRAIN))
    streams = [stream_optimized(raw), b"".join(image_of(extents, len(raw), "disk"))]
    for number, stream in enumerate(streams if zeros else reversed(streams)):
        bench.vcenter.upload(vm.machine.disks[0].file, stream, vm.machine.datacenter)
        track(bench.vcenter, vm, f"52 a/{number}")
        result = take(bench, vm, f"b{number}")
    assert verdict(result) == "agrees"


@pytest.mark.parametrize("now", ["", "52 b/1"], ids=["tracking is off", "tracking restarted"])
def test_cbt_absent(bench: Bench, vm: TestVM, now: str) -> None:
    """If change ids cannot be compared, the tracking is not judged."""
    track(bench.vcenter, vm, "52 a/1")
    take(bench, vm, "b1")
    track(bench.vcenter, vm, now)
    assert verdict(take(bench, vm, "b2")).startswith("absent")


def test_cbt_fails(bench: Bench, vm: TestVM) -> None:
    """If the server cannot report changed areas, only the comparison is skipped."""
    track(bench.vcenter, vm, "52 a/1")
    take(bench, vm, "b1")
    track(bench.vcenter, vm, "52 a/2")
    bench.vcenter.fault(calls={"QueryChangedDiskAreas": "FileFault"})
    assert "FileFault" in verdict(take(bench, vm, "b2"))
