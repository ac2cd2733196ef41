"""The backup job with a vCenter and two stores, as a worker runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.config.schema import BackupSection
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.errors import WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.backup import job as backup
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.vmware.session import VM, VCenterSession
from tests.attempts import attempt_with
from tests.documents import check_document
from tests.servers.vcenter import TestVM, address_of, doors

PREFIX = "snapshots/acme/vol1/b1"
FAST = BackupSection(lease_tries=2, lease_delay_s=0.01, lease_ready_s=60, spill_bytes=0)


class Bench:
    """The parts of one test. A test may replace its fields before ``run``."""

    def __init__(self, vcenter: VCenterSimulator) -> None:
        self.vcenter = vcenter
        self.primary: Any = MemoryStore("primary")
        self.archive: Any = MemoryStore("archive")
        self.options = FAST
        self.address: dict[str, Any] = {}
        self.attempt_fields: dict[str, Any] = {}
        #: The leases of each disk: a second one decides if the lease manifest of the profile differs.
        self.leases = 2 if "manifest" in vcenter._profile else 1
        #: Leases of a killed worker of an earlier test. They are held until they expire.
        self._others: set[str] = set()
        self._others = self.open_leases()

    def open_leases(self) -> set[str]:
        """Return the open leases, without those of an earlier test's killed worker."""
        leases = self.vcenter.state()["leases"]
        return {id_ for id_, lease in leases.items() if lease["state"] == "open"} - self._others

    def attempt(self, **fields: Any) -> Attempt:
        """Return an attempt at job-1."""
        door = doors(self.vcenter, options=self.options, **self.address)
        stores = {"primary": self.primary, "archive": self.archive}
        return attempt_with(door, stores, **self.attempt_fields | fields)

    def request(self, vm: TestVM, /, **fields: Any) -> backup.Request:
        """Return a request for a backup of all disks."""
        values = {"vcenter": "vc1", "vm": vm.machine.id, "account": "acme", "volume": "vol1", "id": "b1"}
        return backup.Request(**values | fields)

    @contextmanager
    def session(self, vm: TestVM) -> Iterator[VM]:
        """Return the VM in a new session."""
        with VCenterSession(address_of(self.vcenter)) as session:
            yield session.find_vm(vm.machine.id)

    def run(self, vm: TestVM, /, **fields: Any) -> dict[str, Any]:
        """Run one attempt."""
        result = backup.run(self.request(vm, **fields), self.attempt())
        check_document("backup.result", result)
        return result

    def fail(self, vm: TestVM, /, **fields: Any) -> WorkerError | None:
        """Run the last attempt and remove its traces. Return its error, or None if it succeeds."""
        try:
            self.run(vm, **fields)
        except WorkerError as error:
            return error
        finally:
            self.vcenter.fault()
            self.attempt_fields = {}
            backup.discard(self.request(vm, **fields), self.attempt())
        return None

    def left(self) -> list[str]:
        """Return everything that the worker has on the stores and on the vCenter."""
        state = self.vcenter.state()
        keys = [each.key for store in (self.primary, self.archive) for each in store.list()]
        parts = [*self.primary.uncommitted(), *self.archive.uncommitted()]
        leases = sorted(self.open_leases())
        return keys + parts + leases + [name for name in state["snapshots"] if name == "ssvm-backup-job-1"]

    def fetches(self, file: str) -> int:
        """Return how often a file of that name was fetched from any lease since the simulator's start."""
        return sum(each["file"] == file and not each.get("refused") for each in self.vcenter.state()["gets"])


def assert_whole(store: MemoryStore, *streams: bytes) -> None:
    """Check the manifest, each object by its digest, and the disks against the host's."""
    manifest = read_manifest(store, Artifact("backup", "acme", "b1", "vol1"))
    for entry in manifest.entries:
        data = read_bytes(store, f"{PREFIX}/{entry.name}")
        assert (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") == (entry.size, entry.digest)
    disks = [entry for entry in manifest.entries if entry.role == "disk"]
    assert [read_bytes(store, f"{PREFIX}/{entry.name}") for entry in disks] == list(streams)
    assert {each.key for each in store.list(PREFIX)} == {f"{PREFIX}/{e.name}" for e in manifest.entries} | {
        f"{PREFIX}/manifest.json"
    }


@pytest.fixture
def bench(vcenter: VCenterSimulator) -> Iterator[Bench]:
    """Return a healthy vCenter and empty stores. The test may leave no snapshot, lease or part of the worker."""
    bench = Bench(vcenter)
    before = set(bench.left())
    yield bench
    kept = {each.key for store in (bench.primary, bench.archive) for each in store.list()}
    assert set(bench.left()) <= before | kept
