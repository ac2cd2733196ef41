"""The export of disks: parallel within a host's limit, checked with the lease manifest, and past slow stores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.errors import Permanent, Retryable, SourceUnavailable, StoreUnavailable
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.jobs.parallel import in_parallel
from ssvm_worker.jobs.restore.backup_reader import read_backup
from ssvm_worker.ledger.slots import LocalSlots, Wait
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.units import KiB, MiB
from ssvm_worker.vmware.trial_stream import MarkerWalk
from tests.backup_bench import FAST, PREFIX, Bench, assert_whole
from tests.faults import store_failing, store_stalling
from tests.servers.vcenter import TestVM, make_vm
from tests.waiting import PATIENCE_S


class Watched(LocalSlots):
    """Slots that record how many were held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.now = self.most = 0

    @contextmanager
    def hold(self, name: str, limit: int, wait: Wait) -> Iterator[None]:
        with super().hold(name, limit, wait):
            if not name.startswith("esxi:"):
                yield
                return
            self.names.add(name)
            self.now += 1
            self.most = max(self.most, self.now)
            yield
            self.now -= 1


@pytest.mark.plain_vcenter  # a vCenter may give a VM one lease
def test_at_once(bench: Bench) -> None:
    """Disks are fetched in parallel: the second one's bytes arrive while the first one is blocked."""
    vm = make_vm(bench.vcenter, 128 * KiB, 128 * KiB, 128 * KiB)
    bench.vcenter.fault(get={"file": "disk-0.vmdk", "do": "stall", "at": 1000})
    before = bench.fetches("disk-2.vmdk")
    runner = threading.Thread(target=bench.run, args=(vm,))
    runner.start()
    while bench.fetches("disk-2.vmdk") == before:
        assert runner.is_alive()
    bench.vcenter.fault()
    runner.join(PATIENCE_S)
    assert_whole(bench.primary, *vm.streams)


@pytest.mark.plain_vcenter  # a differing lease manifest needs a second lease
@pytest.mark.parametrize(("disks", "per_host", "expected"), [(3, 1, 1), (1, 3, 1)], ids=["host", "job"])
def test_limits(bench: Bench, disks: int, per_host: int, expected: int) -> None:
    """The number of parallel disks respects the limits of the job and of the ESXi host."""
    vm, slots = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, 64 * KiB), Watched()
    bench.options = FAST.model_copy(update={"parallel_disks": disks, "per_host": per_host})
    bench.attempt_fields["slots"] = slots
    bench.run(vm)
    assert slots.most == expected
    assert len(slots.names) == 1
    assert slots.names.pop().startswith("esxi:127.0.0.1:")


@pytest.mark.parametrize("exclusive", [True, False])
def test_one_lease_for_each_vm(bench: Bench, exclusive: bool) -> None:
    """If vSphere allows one lease per VM, its disks follow each other and no try is lost."""
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, 64 * KiB, 64 * KiB)
    bench.options = FAST.model_copy(update={"lease_tries": 1, "parallel_disks": 4, "per_host": 4})
    slow = {"file": "disk-0.vmdk", "do": "silence", "at": 1000, "seconds": 1.0}
    bench.vcenter.fault(exclusive=exclusive, get=slow)
    bench.run(vm)
    assert_whole(bench.primary, *vm.streams)


def test_silent_stream(bench: Bench, vm: TestVM) -> None:
    """A stream may be silent for longer than an API call, but not for longer than its own limit."""
    bench.vcenter.fault(get={"do": "silence", "at": 1000, "seconds": 3.0, "times": 1})
    bench.address = {"timeout_s": 2.0}
    bench.options = FAST.model_copy(update={"lease_tries": 1, "parallel_disks": 1})
    bench.run(vm)
    assert_whole(bench.primary, *vm.streams)
    bench.vcenter.fault(get={"do": "stall", "at": 1000})
    bench.address = {"stream_timeout_s": 0.5}
    assert isinstance(bench.fail(vm, id="b2"), SourceUnavailable)


@pytest.mark.parametrize("mode", ["full", "incremental"])
@pytest.mark.parametrize("markers", ["clean", "dirty"])
def test_progress_markers(bench: Bench, markers: str, mode: str) -> None:
    """A host may send progress markers, and left-over bytes in each marker: the backup is whole and has no warning."""
    with bench.vcenter.behaving_like({"switches": {"progress_markers": markers}}):
        vm = make_vm(bench.vcenter, 256 * KiB)
        bench.run(vm, mode=mode)
    walk = MarkerWalk()
    walk(vm.streams[0])
    assert (walk.kinds["progress"], walk.dirty > 0) == (2, markers == "dirty")
    manifest = read_manifest(bench.primary, bench.request(vm).artifact)
    assert [each.facts["warnings"] for each in manifest.entries if "warnings" in each.facts] == [[]]
    (disk,) = read_backup(bench.attempt(), bench.primary, bench.request(vm).artifact)
    assert b"".join(disk.image("raw", "x")) == vm.raws[0]


@pytest.mark.plain_vcenter  # a differing lease manifest needs a second lease
def test_one_fails(bench: Bench) -> None:
    """A failing disk does not stop the others, and the next attempt fetches only that disk."""
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, 64 * KiB, 64 * KiB)
    bench.vcenter.fault(get={"file": "disk-0.vmdk", "status": 503})
    with pytest.raises(SourceUnavailable):
        backup.run(bench.request(vm), bench.attempt(will_resume=lambda _: True))
    bench.vcenter.fault()
    before = [bench.fetches(f"disk-{number}.vmdk") for number in range(4)]
    bench.run(vm)
    assert [bench.fetches(f"disk-{number}.vmdk") - before[number] for number in range(4)] == [1, 0, 0, 0]
    assert_whole(bench.primary, *vm.streams)


def failing(error: Exception) -> Callable[[], None]:
    """Return a task that raises the error."""

    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(("error", "done"), [(Retryable("x"), [1]), (Permanent("x"), []), (KeyError("x"), [])])
def test_rest_of_the_tasks(error: Exception, done: list[int]) -> None:
    """After a temporary error the remaining tasks start, but not after any other error."""
    seen: list[int] = []
    with pytest.raises(type(error)):
        in_parallel(1, [failing(error), lambda: seen.append(1)])
    assert seen == done


def test_gravest_error() -> None:
    """If there are several errors, the one that decides on a retry is raised."""
    with pytest.raises(Permanent):
        in_parallel(3, [failing(Retryable("x")), failing(Permanent("y"))])


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "SHA-256": ({}, "agreed"),
    "SHA-1, on a server before 6.7": (
        {"calls": {"HttpNfcLeaseSetManifestChecksumType": "MethodNotFound"}},
        "agreed",
    ),
    "empty": ({"manifest": "absent"}, "absent"),
    "not on this server": ({"calls": {"HttpNfcLeaseGetManifest": "MethodNotFound"}}, "absent"),
    "refused": ({"calls": {"HttpNfcLeaseGetManifest": "InvalidState"}}, "absent"),
}


@pytest.mark.plain_vcenter  # a differing lease manifest needs a second lease
@pytest.mark.parametrize("name", MANIFESTS)
def test_lease_manifest(bench: Bench, vm: TestVM, name: str) -> None:
    """The server's checksum is compared if it exists; without one the backup says so."""
    fault, expected = MANIFESTS[name]
    bench.vcenter.fault(**fault)
    result = bench.run(vm)
    assert [each["lease_manifest"] for each in result["disks"]] == [expected, expected]
    assert_whole(bench.primary, *vm.streams)


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
def test_lease_manifest_differs(bench: Bench, vm: TestVM, algorithm: str) -> None:
    """Bytes that differ from the lease manifest fail the backup if the settings say so."""
    calls = {"HttpNfcLeaseSetManifestChecksumType": "MethodNotFound"} if algorithm == "sha1" else {}
    bench.options = FAST.model_copy(update={"differing_lease_manifest": "fail"})
    bench.vcenter.fault(manifest="wrong", calls=calls)
    error = bench.fail(vm)
    assert isinstance(error, SourceUnavailable)
    assert "digest" in error.what
    assert not bench.left()


@pytest.mark.parametrize("fault", ["wrong", "zero_size"])
@pytest.mark.parametrize("mode", ["full", "incremental"])
def test_lease_manifest_differs_twice(bench: Bench, fault: str, mode: str) -> None:
    """An intact disk whose lease manifest differs twice is stored with a remark after a check of each grain."""
    vm = make_vm(bench.vcenter, 512 * KiB)
    bench.options = FAST.model_copy(update={"lease_tries": 1})
    bench.vcenter.fault(manifest=fault)
    before = bench.fetches("disk-0.vmdk")
    result = bench.run(vm, mode=mode)
    assert bench.fetches("disk-0.vmdk") == before + 2
    assert [(each["lease_manifest"], each["verified"]) for each in result["disks"]] == [("differs", "adler32/1")]
    assert "twice. Every grain is intact" in result["remarks"][0]


def test_damaged_grain_with_a_differing_manifest(bench: Bench) -> None:
    """A disk with a damaged grain is never stored, if the lease manifest differs too."""
    vm = make_vm(bench.vcenter, 512 * KiB)
    damaged = bytearray(vm.streams[0])
    damaged[len(damaged) // 3] ^= 1
    bench.vcenter.upload(vm.machine.disks[0].file, bytes(damaged))
    bench.vcenter.fault(manifest="wrong")
    assert isinstance(bench.fail(vm), SourceUnavailable)
    assert not bench.left()


def test_certificate(bench: Bench, vm: TestVM) -> None:
    """If a lease has the host's certificate and another thumbprint, the host is trusted by its certificate."""
    bench.vcenter.fault(thumbprint="AB:" * 19 + "AB", certificate=bench.vcenter.ca_file.read_text())
    bench.run(vm)
    assert_whole(bench.primary, *vm.streams)


@pytest.mark.plain_vcenter  # a differing lease manifest is a remark too
@pytest.mark.parametrize("one_file", [False, True])
def test_nvram(bench: Bench, one_file: bool) -> None:
    """OVF and .mf name the stored firmware variables, also if a host sends one file of each lease."""
    vm = make_vm(bench.vcenter, 64 * KiB, nvram=b"variables" * 1000)
    bench.vcenter.fault(one_file=one_file)
    assert bench.run(vm)["remarks"] == []
    assert read_bytes(bench.primary, f"{PREFIX}/b1.nvram") == b"variables" * 1000
    assert b'href="b1.nvram"' in read_bytes(bench.primary, f"{PREFIX}/b1.ovf")
    assert b"SHA256(b1.nvram)" in read_bytes(bench.primary, f"{PREFIX}/b1.mf")
    assert_whole(bench.primary, *vm.streams)


def test_nvram_fails(bench: Bench) -> None:
    """Missing firmware variables do not fail the backup, and its result says so."""
    vm = make_vm(bench.vcenter, 64 * KiB, nvram=b"variables")
    bench.vcenter.fault(get={"file": f"{vm.machine.id}.nvram", "status": 503})
    result = bench.run(vm)
    assert "nvram" in result["remarks"][0]
    assert_whole(bench.primary, *vm.streams)


@pytest.mark.plain_vcenter  # a differing lease manifest is a remark too
@pytest.mark.parametrize(("firmware", "remarks"), [("bios", 0), ("efi", 1)])
def test_no_nvram(bench: Bench, firmware: str, remarks: int) -> None:
    """If the lease lists no firmware variables, the result of a VM with EFI says so."""
    result = bench.run(make_vm(bench.vcenter, 64 * KiB, firmware=firmware))
    assert len(result["remarks"]) == remarks


@pytest.mark.plain_vcenter  # a differing lease manifest needs a second lease
@pytest.mark.parametrize("mode", ["full", "incremental"])
@pytest.mark.parametrize("end", ["no_last_chunk", "no_last_chunk_cut", "close", "close_cut"])
def test_end_of_body(bench: Bench, end: str, mode: str) -> None:
    """A complete disk is stored, however its connection ends; an error at the end is a warning."""
    vm = make_vm(bench.vcenter, 512 * KiB)
    bench.vcenter.fault(body_end=end)
    bench.run(vm, mode=mode)
    entry = read_manifest(bench.primary, bench.request(vm).artifact).entries[0]
    assert entry.facts["lease_manifest"] == "agreed"
    assert len(entry.facts["warnings"]) == (end != "close")


def test_change_ids(bench: Bench) -> None:
    """The change id of each disk is stored with the disk."""
    vm = make_vm(bench.vcenter, 64 * KiB, 64 * KiB, change_id="52 de ad be/7")
    assert [each["change_id"] for each in bench.run(vm)["disks"]] == ["52 de ad be/7"] * 2
    manifest = read_manifest(bench.primary, bench.request(vm).artifact)
    assert {each.facts["change_id"] for each in manifest.entries if each.role == "disk"} == {"52 de ad be/7"}


@pytest.mark.plain_vcenter  # it counts the consolidations
def test_consolidation(bench: Bench, vm: TestVM) -> None:
    """Leftover deltas are consolidated after the snapshot's removal; if that fails, it counts as not removed."""
    before = bench.vcenter.state()["calls"].get("ConsolidateVMDisks_Task", 0)
    bench.run(vm, id="b0")
    assert bench.vcenter.state()["calls"].get("ConsolidateVMDisks_Task", 0) == before
    bench.vcenter.fault(consolidate=True)
    assert bench.run(vm)["snapshot_removed"] is True
    assert bench.vcenter.state()["calls"]["ConsolidateVMDisks_Task"] == before + 1
    bench.vcenter.fault(consolidate=True, calls={"ConsolidateVMDisks_Task": "FileLocked"})
    assert bench.run(vm, id="b2")["snapshot_removed"] is False
    bench.vcenter.fault()
    assert bench.run(vm, id="b3")["snapshot_removed"] is True


def test_slow_secondary(bench: Bench, tmp_path: Path) -> None:
    """A secondary store that stays too slow is reported as owed, and delays neither the lease nor the primary."""
    vm = make_vm(bench.vcenter, 24 * MiB)
    inner = bench.archive
    bench.archive, stall = store_stalling(inner, after=0)
    bench.options = FAST.model_copy(update={"spill_dir": tmp_path, "spill_bytes": 2 * MiB})
    result = bench.run(vm, stores=["primary", "archive"])
    stall.released.set()
    bench.archive = inner
    assert "too slow" in result["owed"]["archive"]["what"]
    assert_whole(bench.primary, *vm.streams)


def test_slow_for_a_while(bench: Bench, tmp_path: Path) -> None:
    """A store that is slow for a while gets the spilled bytes, after the lease has already ended."""
    vm = make_vm(bench.vcenter, 24 * MiB)
    inner = bench.primary
    bench.primary, stall = store_stalling(inner, after=0)
    bench.options = FAST.model_copy(update={"spill_dir": tmp_path, "spill_bytes": 60 * MiB})
    before = bench.fetches("disk-0.vmdk")
    runner = threading.Thread(target=bench.run, args=(vm,))
    runner.start()
    while bench.fetches("disk-0.vmdk") == before or bench.vcenter.state()["gets"][-1]["bytes"] < len(vm.streams[0]):
        assert runner.is_alive()
    stall.released.set()
    runner.join(PATIENCE_S)
    bench.primary = inner
    assert_whole(bench.primary, *vm.streams)
    assert not list(tmp_path.iterdir())


@pytest.mark.plain_vcenter  # it does not clean up a snapshot of a busy VM
def test_primary_fails_behind_the_spill(bench: Bench, vm: TestVM, tmp_path: Path) -> None:
    """The primary's error is raised even if it occurs behind the scratch file."""
    bench.primary = store_failing(MemoryStore("primary"), after=100 * KiB)
    bench.options = FAST.model_copy(update={"spill_dir": tmp_path, "spill_bytes": 2 * MiB})
    with pytest.raises(StoreUnavailable, match="by request"):
        bench.run(vm)
    bench.primary = MemoryStore("primary")
