"""A worker that is killed during an incremental backup."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from tests.backup_bench import Bench
from tests.grain_bench import packs, restored
from tests.images import GRAIN
from tests.servers.vcenter import make_vm
from tests.unit.jobs.backup.test_backup_killed import start_worker
from tests.unit.jobs.backup.test_incremental_backup import found, take, write
from tests.waiting import CLAIM_S

pytestmark = pytest.mark.e2e


def test_killed(bench: Bench, tmp_path: Path) -> None:
    """The next worker uses and counts a killed worker's complete packs, and its incomplete ones are deleted."""
    vm = make_vm(bench.vcenter, 620 * GRAIN)
    write(bench.vcenter, vm, os.urandom(620 * GRAIN))
    bench.vcenter.fault(
        lease_timeout=math.ceil(2 * CLAIM_S), get={"file": "disk-0.vmdk", "do": "stall", "at": 600 * GRAIN}
    )
    with start_worker(bench, vm, tmp_path, mode="incremental") as worker:
        while not packs(FileStore("primary", tmp_path)):
            assert worker.poll() is None
        worker.kill()
    bench.vcenter.fault()
    bench.primary = FileStore("primary", tmp_path)
    (kept,) = packs(bench.primary)
    result = take(bench, vm, "b1", stores=["primary"])
    assert kept in packs(bench.primary)
    assert result["new_bytes"] == sum(bench.primary.stat(each).size for each in packs(bench.primary))
    assert result["reused_bytes"] == 0
    assert restored(bench.primary, found(bench.primary, "b1")) == vm.raws[0]
    assert len(packs(bench.primary)) == len([each for each in tmp_path.rglob("_packs/*/*") if each.is_file()]) == 2
    bench.primary = MemoryStore("primary")
    while any(lease["state"] == "open" for lease in bench.vcenter.state()["leases"].values()):
        pass  # the killed worker's lease exists until its time-out
