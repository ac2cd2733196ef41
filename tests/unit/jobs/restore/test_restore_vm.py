"""A backup restored as a new VM on a real vCenter API: the VM has the backup's content, or no VM exists."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import vim

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.manifest import Entry, write_manifest
from ssvm_worker.config.schema import BackupSection
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.errors import (
    Cancelled,
    ChecksumMismatch,
    InvalidRequest,
    LeaseLost,
    Retryable,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    WorkerError,
)
from ssvm_worker.formats.extents import vmdk_extents
from ssvm_worker.formats.writers import vmdk as writers
from ssvm_worker.formats.writers.raw import raw as to_raw
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.restore import job as restore
from ssvm_worker.stores import open_store
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from ssvm_worker.units import KiB, MiB, TiB
from ssvm_worker.vmware.preflight import RESTORE_PRIVILEGES
from ssvm_worker.vmware.session import VCenterSession
from tests.attempts import attempt_with
from tests.backup_bench import Bench
from tests.backups import BACKUP, content, store_backup
from tests.documents import check_document
from tests.faults import store_corrupting
from tests.images import GRAIN
from tests.servers.s3 import S3Server
from tests.servers.vcenter import TestVM, address_of, doors, make_vm, profile
from tests.waiting import PATIENCE_S

DISKS = [content(1 * MiB, seed=1), content(768 * KiB, seed=2)]
#: Each test has its own VM name, because a VM's files disappear shortly after the VM.
PLACE = {"vcenter": "vc1", "name": "restored", "pool": "DC0_C0"}
_numbers = itertools.count(1)


def asked(**fields: Any) -> restore.Request:
    """Return a request for a new VM."""
    return parse_request(restore.Request, {"account": "acme", "volume": "vol1", "id": "b1"} | PLACE | fields, "restore")


class Restores:
    """A vCenter, and a store with a backup."""

    def __init__(self, vcenter: VCenterSimulator) -> None:
        self.vcenter = vcenter
        self.store: Store = MemoryStore("primary")
        self.options = BackupSection(spill_bytes=0, lease_ready_s=60)
        self.address: dict[str, Any] = {}
        #: Leases that an earlier test's killed worker holds until they time out.
        self._others = self._open_leases()

    def _open_leases(self) -> set[str]:
        return {id_ for id_, lease in self.vcenter.state()["leases"].items() if lease["state"] == "open"}

    def attempt(self, **given: Any) -> Attempt:
        door = doors(self.vcenter, options=self.options, **self.address)
        return attempt_with(door, {self.store.name: self.store}, **given)

    def find(self, name: str = "") -> str:
        """Return the id of the VM of that name, or of the test's VM; empty if none exists."""
        with VCenterSession(address_of(self.vcenter)) as session:
            try:
                return session.find_vm(f"/DC0/vm/{name or PLACE['name']}").moref
            except SourceNotFound:
                return ""

    def fail(self, **fields: Any) -> WorkerError:
        """Return the error of one attempt, and check that it left no VM and no lease."""
        with pytest.raises(WorkerError) as caught:
            restore.run(asked(**fields), self.attempt())
        assert not self.find()
        assert self._open_leases() <= self._others
        return caught.value


@pytest.fixture
def restores(vcenter: VCenterSimulator) -> Iterator[Restores]:
    """Return a healthy vCenter without the test's VM before and after, and a backup of two disks."""
    PLACE["name"] = f"restored{next(_numbers)}"
    it = Restores(vcenter)
    store_backup(it.store, *DISKS)
    yield it
    vcenter.fault()
    restore.discard(asked(), it.attempt())
    assert not it.find()


def test_backed_up_again(restores: Restores, bench: Bench, vm: TestVM) -> None:
    """A backup of a restored backup is equal to the last byte."""
    bench.run(vm)
    restores.store = bench.primary
    made = restore.run(asked(), restores.attempt())
    check_document("restore.result", made)
    assert all(each["length"] == each["bytes"] for each in restores.vcenter.state()["puts"][-2:])
    bench.run(vm, vm=made["vm"], id="b2")
    for number, stream in enumerate(vm.streams):
        assert read_bytes(bench.primary, f"snapshots/acme/vol1/b2/b2-disk{number}.vmdk") == stream
    agrees = "vSphere says" not in str(made["warnings"])
    assert [each["confirmed"] for each in made["files"]] == [agrees, agrees]


@pytest.mark.parametrize("name", ["awkward", "differing-manifest"])
def test_other_vcenters(restores: Restores, bench: Bench, name: str) -> None:
    """A VM is backed up and restored on a vCenter that behaves like a profile of the tests' data."""
    with restores.vcenter.behaving_like({"switches": profile(name)}):
        vm = make_vm(bench.vcenter, 256 * KiB)
        bench.run(vm)
        restores.store = bench.primary
        made = restore.run(asked(), restores.attempt())
        bench.run(vm, vm=made["vm"], id="b2")
    stream = read_bytes(bench.primary, "snapshots/acme/vol1/b2/b2-disk0.vmdk")
    assert b"".join(to_raw(vmdk_extents(iter([stream]), "disk", 256 * KiB), 256 * KiB, "disk")) == vm.raws[0]


def test_from_s3(restores: Restores, s3_server: S3Server) -> None:
    """A backup in a bucket goes directly to the host, with its length sent first."""
    keys = {"endpoint": s3_server.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    restores.store = open_store("primary", f"s3://{s3_server.make_bucket()}", **keys)
    manifest = store_backup(restores.store, *DISKS)
    restore.run(asked(), restores.attempt())
    sizes = [each.size for each in manifest.entries if each.role == "disk"]
    puts = restores.vcenter.state()["puts"][-2:]
    assert sorted((each["length"], each["bytes"]) for each in puts) == sorted((size, size) for size in sizes)


def test_standalone_host(esx: VCenterSimulator) -> None:
    """A standalone ESXi host accepts a VM too, and needs no placement."""
    store = MemoryStore("primary")
    store_backup(store, DISKS[0])
    trying = attempt_with(doors(esx, options=BackupSection(spill_bytes=0)), {"primary": store})
    made = restore.run(asked(pool=None), trying)
    with VCenterSession(address_of(esx)) as session:
        assert session.find_vm(made["vm"]).hardware().disks[0].capacity == len(DISKS[0])
    restore.discard(asked(pool=None), trying)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        pytest.param({"pool": None}, "There are: DC0_C0.*DC0_H0", id="no pool where there are several"),
        pytest.param({"pool": "fast"}, "no resource pool 'fast'.*DC0_H0", id="unknown pool"),
        pytest.param({"folder": "attic"}, "no VM folder 'attic'.*vm", id="unknown folder"),
        pytest.param({"datastore": "nvme"}, "no datastore 'nvme'.*LocalDS_0", id="unknown datastore"),
        pytest.param({"datastore": "POD0"}, "no datastore of the cluster 'POD0'", id="empty datastore cluster"),
        pytest.param({"networks": {"VM Network": "dmz"}}, "no network 'dmz'.*DC0_DVPG0", id="unknown network"),
        pytest.param({"networks": {"lan": "VM Network"}}, "no network 'lan'.*VM Network", id="a network it has not"),
    ],
)
def test_unknown_places(restores: Restores, fields: dict[str, Any], said: str) -> None:
    """The error of an unknown placement lists the existing ones, before any change."""
    before = restores.vcenter.state()["calls"].get("ImportVApp", 0)
    with pytest.raises(InvalidRequest, match=said):
        restore.run(asked(**fields), restores.attempt())
    assert restores.vcenter.state()["calls"].get("ImportVApp", 0) == before


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"pool": "DC0_C0/Resources", "datastore": "LocalDS_0"}, id="names"),
        pytest.param({"datastore": "POD0"}, id="datastore cluster"),
        pytest.param({"folder": "/DC0/vm"}, id="path of the folder"),
        pytest.param({"networks": {"VM Network": "DC0_DVPG0"}}, id="another network"),
    ],
)
def test_known_places(restores: Restores, fields: dict[str, Any]) -> None:
    """Folder, pool, datastore, its cluster and networks are found by their names."""
    restores.vcenter.fault(storage_pod=True)
    assert restore.run(asked(**fields), restores.attempt())["vm"] == restores.find()


@pytest.mark.parametrize("fault", ["NotSupported", "InvalidArgument"])
def test_cluster_without_drs(restores: Restores, fault: str) -> None:
    """In a cluster without DRS, the worker chooses a host that is not in maintenance mode."""
    restores.vcenter.fault(no_drs=fault, maintenance=2)
    made = restore.run(asked(), restores.attempt())
    with VCenterSession(address_of(restores.vcenter)) as session:
        connection = session._connection
        host = connection.read(session.find_vm(made["vm"])._vm, "runtime.host")["runtime.host"]
        assert not connection.read(host, "runtime.inMaintenanceMode")["runtime.inMaintenanceMode"]


def test_no_host_can_run_it(restores: Restores) -> None:
    """If no host can run the VM, the error gives a reason for each, and nothing is created."""
    before = restores.vcenter.state()["calls"].get("ImportVApp", 0)
    restores.vcenter.fault(no_drs="NotSupported", maintenance=3)
    error = restores.fail()
    assert isinstance(error, InvalidRequest)
    assert error.remedy.count("is in maintenance mode") == 3
    assert restores.vcenter.state()["calls"].get("ImportVApp", 0) == before


def test_given_host(restores: Restores) -> None:
    """A request may name the host."""
    with VCenterSession(address_of(restores.vcenter)) as session:
        hosts = list(session._connection.each(vim.HostSystem, "parent"))
    cluster = [host for host, values in hosts if isinstance(values["parent"], vim.ClusterComputeResource)]
    made = restore.run(asked(host=cluster[-1]._moId), restores.attempt())
    with VCenterSession(address_of(restores.vcenter)) as session:
        vm = session.find_vm(made["vm"])._vm
        assert session._connection.read(vm, "runtime.host")["runtime.host"] == cluster[-1]


PRIVILEGES = [each for steps in RESTORE_PRIVILEGES.values() for needed in steps.values() for each in needed]


@pytest.mark.parametrize("privilege", PRIVILEGES)
def test_missing_privilege(restores: Restores, privilege: str) -> None:
    """A missing privilege is named before anything is created."""
    before = restores.vcenter.state()["calls"].get("ImportVApp", 0)
    restores.vcenter.fault(lacks=[privilege])
    with pytest.raises(SourceDenied, match=re.escape(privilege)):
        restore.run(asked(), restores.attempt())
    assert restores.vcenter.state()["calls"].get("ImportVApp", 0) == before


@pytest.mark.parametrize("privilege", [each for each in PRIVILEGES if each != "VirtualMachine.Inventory.Delete"])
def test_privilege_that_nobody_may_query(restores: Restores, privilege: str) -> None:
    """If the user may not query privileges, vCenter's own refusal names the missing one."""
    restores.vcenter.fault(lacks=[privilege], calls={"HasUserPrivilegeOnEntities": "NoPermission"})
    error = restores.fail()
    assert isinstance(error, SourceDenied)
    assert privilege in error.remedy


def test_refused_deletion(restores: Restores) -> None:
    """If vCenter refuses to delete the VM of an earlier attempt, the error names the privilege, and the VM stays."""
    made = restore.run(asked(), restores.attempt())
    restores.vcenter.fault(
        lacks=["VirtualMachine.Inventory.Delete"], calls={"HasUserPrivilegeOnEntities": "NoPermission"}
    )
    with pytest.raises(SourceDenied) as caught:
        restore.run(asked(), restores.attempt(number=2))
    assert "VirtualMachine.Inventory.Delete" in caught.value.remedy
    assert restores.find() == made["vm"]


def test_import_warning(restores: Restores) -> None:
    """A warning of vCenter about the descriptor is in the result."""
    restores.vcenter.fault(import_warning="OvfUnsupportedDeviceExport")
    assert "OvfUnsupportedDeviceExport" in restore.run(asked(), restores.attempt())["warnings"]


@pytest.mark.parametrize("largest", [2 * TiB, 62 * TiB])
def test_large_disk(restores: Restores, bench: Bench, largest: int) -> None:
    """A disk of 3 TiB is restored if vCenter takes it; otherwise the error has vCenter's reason, and no VM is made."""
    stream = b"".join(writers.stream_optimized([(2 * TiB + GRAIN, b"data")], 3 * TiB, "disk"))
    machine = restores.vcenter.add_vm(f"large{PLACE['name']}", [stream], [3 * TiB])
    restores.vcenter.fault()  # the simulator counts 3 TiB of its datastore as used, until it sets the space again
    bench.run(TestVM(machine, [], [stream]))
    restores.store = bench.primary
    restores.vcenter.fault(max_disk=largest)
    if largest < 3 * TiB:
        error = restores.fail()
        assert isinstance(error, InvalidRequest)
        assert "FileTooLarge" in error.what
        return
    made = restore.run(asked(), restores.attempt())
    with VCenterSession(address_of(restores.vcenter)) as session:
        (disk,) = session.find_vm(made["vm"]).hardware().disks
    assert disk.capacity == 3 * TiB


def test_name_is_taken(restores: Restores, vm: TestVM) -> None:
    """An existing foreign VM is never changed."""
    name = vm.machine.path.rpartition("/")[2]
    with pytest.raises(InvalidRequest, match="already"):
        restore.run(asked(name=name), restores.attempt())
    restore.discard(asked(name=name), restores.attempt())
    assert restores.find(name) == vm.machine.id


def test_one_that_another_job_made(restores: Restores) -> None:
    """A VM that another restore has made is never changed."""
    made = restore.run(asked(), restores.attempt())
    with pytest.raises(InvalidRequest, match="already"):
        restore.run(asked(), restores.attempt(job_id="job-2"))
    assert restores.find() == made["vm"]


SIZE = 599_040  # of the first disk's stream
FAULTS: dict[str, tuple[dict[str, Any], type[WorkerError]]] = {
    "the upload is cut at its first byte": ({"put": {"do": "cut", "at": 0}}, SourceUnavailable),
    "the upload is cut in the middle": ({"put": {"do": "cut", "at": 300_000}}, SourceUnavailable),
    "the upload is cut in its last sector": ({"put": {"do": "cut", "at": SIZE - 100}}, SourceUnavailable),
    "the second upload is cut": ({"put": {"file": "disk-1.vmdk", "do": "cut", "at": 1}}, SourceUnavailable),
    "the lease expires in the middle": ({"put": {"do": "expire", "at": 300_000}}, Retryable),
    "status 503": ({"put": {"status": 503}}, SourceUnavailable),
    "status 404": ({"put": {"status": 404}}, Retryable),
    "the lease ends in an error": ({"lease_error": "Timedout"}, LeaseLost),
    "no privilege to import": ({"calls": {"ImportVApp": "NoPermission"}}, SourceDenied),
    "the OVF is not judged": ({"calls": {"CreateImportSpec": "RuntimeFault"}}, SourceUnavailable),
    "the lease cannot be completed": ({"calls": {"HttpNfcLeaseComplete": "Timedout"}}, LeaseLost),
    "the host shows another certificate": ({"thumbprint": "11:" * 19 + "11", "certificate": ""}, SourceDenied),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(restores: Restores, name: str) -> None:
    """A failed import leaves no VM and no lease."""
    fault, expected = FAULTS[name]
    restores.vcenter.fault(**fault)
    assert isinstance(restores.fail(), expected)


@pytest.mark.parametrize("reaction", ["warn", "fail"])
@pytest.mark.parametrize("manifest", ["wrong", "zero_size"])
def test_manifest_differs(restores: Restores, manifest: str, reaction: str) -> None:
    """If two lease manifests contradict the sent bytes, the VM is kept with a warning, or removed with the setting."""
    restores.vcenter.fault(manifest=manifest)
    restores.options = restores.options.model_copy(update={"differing_lease_manifest": reaction})
    if reaction == "fail":
        assert isinstance(restores.fail(), SourceUnavailable)
        return
    made = restore.run(asked(), restores.attempt())
    assert made["vm"] == restores.find()
    assert [each["confirmed"] for each in made["files"]] == [False, False]
    assert sum("vSphere says that it received" in each for each in made["warnings"]) == 2


def test_never_ready(restores: Restores) -> None:
    """A lease that is never ready is given up with its VM."""
    restores.options = BackupSection(spill_bytes=0, lease_ready_s=1)
    restores.vcenter.fault(never_ready=True)
    assert isinstance(restores.fail(), LeaseLost)


def test_again_after_a_fault(restores: Restores) -> None:
    """An attempt after a failed one makes the VM, once vSphere has deleted the failed one's files."""
    restores.vcenter.fault(put={"file": "disk-1.vmdk", "do": "cut", "at": 100, "times": 1})
    with pytest.raises(SourceUnavailable):
        restore.run(asked(), restores.attempt())
    made = None
    while made is None:
        with contextlib.suppress(SourceUnavailable):  # its files disappear shortly after the VM
            made = restore.run(asked(), restores.attempt(number=2))["vm"]
    assert made == restores.find()


def test_damaged_backup(restores: Restores) -> None:
    """Damage in the second disk is detected during the transfer, and no VM with a wrong disk is left."""
    restores.store = MemoryStore("primary")
    store_backup(store_corrupting(restores.store, at=100_000, chosen=lambda key: "disk1" in key), *DISKS)
    assert isinstance(restores.fail(), ChecksumMismatch)


@pytest.mark.parametrize("patient", [True, False])
def test_late_confirmation(restores: Restores, patient: bool) -> None:
    """A host may take ``stream_timeout_s`` to close a disk; after that, the restore fails and leaves no VM."""
    restores.address = {} if patient else {"stream_timeout_s": 0.2}
    restores.vcenter.fault(put={"do": "late", "seconds": 0.3 if patient else PATIENCE_S})
    if patient:
        assert restore.run(asked(), restores.attempt())["vm"] == restores.find()
    else:
        assert isinstance(restores.fail(), SourceUnavailable)


def test_cancelled(restores: Restores) -> None:
    """A cancel while the host reads nothing ends the job, and the VM is deleted."""
    restores.vcenter.fault(put={"do": "stall", "at": 300_000})
    puts = len(restores.vcenter.state()["puts"])
    trying = restores.attempt()
    trying.stop_reason = lambda: "user" if len(restores.vcenter.state()["puts"]) > puts else None
    with pytest.raises(Cancelled):
        restore.run(asked(), trying)
    assert not restores.find()


#: One attempt in its own process, with the given fields.
WORKER = """
import json, pathlib, sys
from types import SimpleNamespace
from ssvm_worker.formats.extents import vmdk_extents
from ssvm_worker.formats.writers.raw import raw as to_raw
from ssvm_worker.jobs.restore import job as restore
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.vmware.session import Address, VCenterSession
from tests.attempts import attempt_with
given = json.loads(sys.argv[1])
door = SimpleNamespace(vcenter=lambda name, check: VCenterSession(Address(**given["address"]), check))
store = FileStore("primary", pathlib.Path(given["directory"]))
restore.run(restore.Request(**given["request"]), attempt_with(door, {"primary": store}))
"""


def test_killed(restores: Restores, tmp_path: Path) -> None:
    """The next attempt deletes a killed worker's half-restored VM, and makes it again."""
    vcenter = restores.vcenter
    restores.store = FileStore("primary", tmp_path)
    store_backup(restores.store, *DISKS)
    vcenter.fault(put={"file": "disk-1.vmdk", "do": "stall", "at": 100_000})
    puts = len(vcenter.state()["puts"])
    address = {"host": vcenter.host, "port": vcenter.port, "ca_file": str(vcenter.ca_file)}
    login = {"username": vcenter.username, "password": vcenter.password}
    given = {"address": address | login, "directory": str(tmp_path), "request": asked().model_dump()}
    with subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(given)]) as worker:
        while len(vcenter.state()["puts"]) < puts + 2:
            assert worker.poll() is None
        worker.kill()
    half = restores.find()
    assert half
    vcenter.fault()
    made = restore.run(asked(), restores.attempt(number=2))
    assert made["vm"] == restores.find() != half


def test_missing_descriptor(restores: Restores) -> None:
    """A backup whose OVF does not name its disks cannot become a VM, and the error lists its content."""
    other = restores.store
    restores.store = MemoryStore("primary")
    manifest = store_backup(restores.store, DISKS[0], artifact=BACKUP)
    assert manifest.entry("b1.ovf") is not None
    restores.store.delete(BACKUP.key("b1.ovf"))
    with pytest.raises(WorkerError, match=r"b1\.ovf"):
        restore.run(asked(), restores.attempt())
    restores.store = other


def test_encoded_names(restores: Restores) -> None:
    """A descriptor with percent-encoded hrefs names the same disks."""
    manifest = store_backup(restores.store, *DISKS)
    key, owner = BACKUP.key("b1.ovf"), Owner("backup-job")
    text = read_bytes(restores.store, key).replace(b'href="b1-disk', b'href="b1%2Ddisk')
    put_bytes(restores.store, key, text, owner)
    entry = Entry("b1.ovf", len(text), str(digest_of(text)), "descriptor")
    write_manifest(restores.store, manifest.with_entry(entry), owner)
    assert len(restore.run(asked(), restores.attempt())["files"]) == 2


def test_from_an_incremental_backup(restores: Restores, bench: Bench, vm: TestVM) -> None:
    """Disks in grains become streams with a length sent first, and have the VM's content."""
    bench.run(vm, mode="incremental")
    restores.store = bench.primary
    made = restore.run(asked(), restores.attempt())
    bench.run(vm, vm=made["vm"], id="b2")
    for number, raw in enumerate(vm.raws):
        stream = read_bytes(bench.primary, f"snapshots/acme/vol1/b2/b2-disk{number}.vmdk")
        assert b"".join(to_raw(vmdk_extents(iter([stream]), "disk", len(raw)), len(raw), "disk")) == raw
