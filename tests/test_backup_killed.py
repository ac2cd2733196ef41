"""A worker that is killed in the middle of a backup: the next one goes on from what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ssvm_worker.stores.file import FileStore
from ssvm_worker.stores.memory import MemoryStore
from tests.backup_bench import PREFIX, Bench
from tests.servers.vcenter import TestVM

#: One attempt in a process of its own, with the fields that it is given.
WORKER = """
import json, pathlib, sys
from types import SimpleNamespace
from ssvm_worker.jobs import backup
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.stores.file import FileStore
from ssvm_worker.vmware.session import Address, Options, Session
given = json.loads(sys.argv[1])
door = SimpleNamespace(vcenter=lambda name, check: Session(Address(**given["address"]), check, Options(parallel_disks=1)))
store = FileStore("primary", pathlib.Path(given["directory"]))
backup.run(backup.Request(**given["request"]), Attempt("job-1", {"primary": store}, door))
"""


def start_worker(bench: Bench, vm: TestVM, directory: Path) -> subprocess.Popen[bytes]:
    """A worker that has begun with that backup."""
    vcenter = bench.vcenter
    address = {"host": vcenter.host, "port": vcenter.port, "ca_file": str(vcenter.ca_file)}
    login = {"username": vcenter.username, "password": vcenter.password}
    request = bench.request(vm).model_dump()
    given = {"address": address | login, "directory": str(directory), "request": request}
    return subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(given)])


def test_killed(bench: Bench, vm: TestVM, tmp_path: Path) -> None:
    """Its committed disk stays and its snapshot is used; its lease expires, its parts are swept, its snapshot goes."""
    bench.vcenter.fault(lease_timeout=2, get={"file": "disk-1.vmdk", "do": "stall", "at": 300_000})
    before = bench.fetches("disk-0.vmdk"), bench.fetches("disk-1.vmdk")
    with start_worker(bench, vm, tmp_path) as worker:
        while bench.fetches("disk-1.vmdk") == before[1]:
            assert worker.poll() is None
        worker.kill()
    assert not (tmp_path / PREFIX / "manifest.json").exists()
    bench.vcenter.fault()
    bench.primary = FileStore("primary", tmp_path)
    bench.run(vm)
    assert bench.fetches("disk-0.vmdk") == before[0] + 1
    disks = [(tmp_path / PREFIX / f"b1-disk{number}.vmdk").read_bytes() for number in range(2)]
    assert disks == vm.streams
    assert len(list((tmp_path / PREFIX).iterdir())) == 6
    bench.primary = MemoryStore("primary")
    while any(lease["state"] == "open" for lease in bench.vcenter.state()["leases"].values()):
        pass  # the dead worker's lease: it lives until its time-out
