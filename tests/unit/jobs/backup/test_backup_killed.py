"""A worker that is killed during a backup: the next one continues from its leftovers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.grain_store.reader import packs_of
from ssvm_worker.jobs.restore.backup_reader import read_backup
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.units import KiB
from tests.backup_bench import PREFIX, Bench, assert_whole
from tests.servers.vcenter import TestVM, make_vm
from tests.waiting import CLAIM_S

#: One attempt in its own process, with the given fields.
WORKER = """
import json, pathlib, sys
from types import SimpleNamespace
from ssvm_worker.config.schema import BackupSection
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.vmware.session import Address, VCenterSession
from tests.attempts import attempt_with
given = json.loads(sys.argv[1])
options = BackupSection(spill_bytes=0, parallel_disks=1)
door = SimpleNamespace(vcenter=lambda name, check: VCenterSession(Address(**given["address"]), check, options))
store = FileStore("primary", pathlib.Path(given["directory"]))
backup.run(backup.Request(**given["request"]), attempt_with(door, {"primary": store}))
"""


def start_worker(bench: Bench, vm: TestVM, directory: Path, **fields: Any) -> subprocess.Popen[bytes]:
    """Start a worker, and wait until it has begun that backup."""
    vcenter = bench.vcenter
    address = {"host": vcenter.host, "port": vcenter.port, "ca_file": str(vcenter.ca_file)}
    login = {"username": vcenter.username, "password": vcenter.password}
    request = bench.request(vm, **fields).model_dump()
    given = {"address": address | login, "directory": str(directory), "request": request}
    return subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(given)])


#: Where the worker is held, so that it is killed exactly there.
STAGES: dict[str, dict[str, Any]] = {
    "its snapshot was made": {"hang": "ExportSnapshot"},
    "its lease was open": {"get": {"file": "disk-0.vmdk", "do": "stall"}},
    "one disk of three was done": {"get": {"file": "disk-1.vmdk", "do": "stall", "at": 300_000}},
    "all disks were done, but no manifest written": {"hang": "CreateDescriptor", "hang_after": 1},
    "the manifest was written, but its snapshot not removed": {"hang": "RemoveSnapshot_Task"},
}
#: How often the three disks are fetched afterwards.
FETCHES = [(1, 1, 1), (1, 1, 1), (0, 1, 1), (0, 0, 0), (0, 0, 0)]


@pytest.fixture
def vm(vcenter: VCenterSimulator) -> TestVM:
    """Return a VM with three disks."""
    return make_vm(vcenter, 512 * KiB, 768 * KiB, 256 * KiB)


def reached(bench: Bench, stage: dict[str, Any]) -> int:
    """Return how often a worker has reached the point where it is held."""
    if "get" in stage:
        return bench.fetches(stage["get"]["file"])
    return int(bench.vcenter.state()["calls"].get(stage["hang"], 0)) - int(stage.get("hang_after", 0))


def fetches(bench: Bench) -> list[int]:
    """Return how often each of the three disks was fetched so far."""
    return [bench.fetches(f"disk-{number}.vmdk") for number in range(3)]


def assert_nothing_stray(bench: Bench, vm: TestVM) -> None:
    """Check that the disks have the VM's content, and that no unneeded pack exists."""
    disks = read_backup(bench.attempt(), bench.primary, bench.request(vm).artifact)
    assert [b"".join(each.image("raw", "x")) for each in disks] == vm.raws
    needed = packs_of(bench.primary, disks[0].manifest)
    assert [each.key for each in bench.primary.list("snapshots/acme/vol1/_packs")] == sorted(needed)


@pytest.mark.plain_vcenter  # it counts the fetches
@pytest.mark.parametrize("mode", ["full", "incremental"])
@pytest.mark.parametrize(("name", "expected"), list(zip(STAGES, FETCHES, strict=True)))
def test_killed(bench: Bench, vm: TestVM, tmp_path: Path, name: str, expected: tuple[int, int, int], mode: str) -> None:
    """The next worker reuses the stored disks and the snapshot, and deletes all other leftovers."""
    before = reached(bench, STAGES[name] | {"hang_after": 0})
    bench.vcenter.fault(lease_timeout=math.ceil(CLAIM_S), **STAGES[name])
    with start_worker(bench, vm, tmp_path, mode=mode) as worker:
        while reached(bench, STAGES[name]) <= before:
            assert worker.poll() is None
        worker.kill()
    bench.vcenter.fault()
    bench.primary, so_far = FileStore("primary", tmp_path), fetches(bench)
    snapshots = bench.vcenter.state()["calls"]["CreateSnapshotEx_Task"]
    assert bench.run(vm, mode=mode)["snapshot_removed"] is True
    assert tuple(now - then for now, then in zip(fetches(bench), so_far, strict=True)) == expected
    assert bench.vcenter.state()["calls"]["CreateSnapshotEx_Task"] == snapshots
    assert len(list((tmp_path / PREFIX).iterdir())) == 7
    if mode == "full":
        assert_whole(bench.primary, *vm.streams)
    else:
        assert_nothing_stray(bench, vm)
    bench.primary = MemoryStore("primary")
    while bench.open_leases():
        time.sleep(0.1)  # the killed worker's lease exists until its time-out
