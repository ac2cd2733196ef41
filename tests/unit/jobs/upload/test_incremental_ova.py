"""An incremental backup uploaded as one OVA: its disks become streams again in the same pass."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.errors import CorruptImage, InvalidRequest
from ssvm_worker.formats.ova import read_checksums, read_descriptor, read_sizes
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.upload import job as upload
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from tests.attempts import attempt
from tests.backup_bench import Bench
from tests.grain_bench import OWNER, changed, packs
from tests.images import GRAIN, stream_optimized
from tests.qemu import assert_same_disk
from tests.servers.http import HttpServer
from tests.servers.vcenter import TestVM, make_vm

FILES = ["b2-disk0.vmdk", "b2-disk1.vmdk", "b2.nvram"]


@pytest.fixture
def vm(vcenter: VCenterSimulator) -> TestVM:
    """Return a VM with firmware variables and two disks, of which one ends inside a grain."""
    return make_vm(vcenter, 40 * GRAIN, 7 * GRAIN + 512, nvram=b"variables" * 100)


@pytest.fixture
def store(bench: Bench, vcenter: VCenterSimulator, vm: TestVM) -> MemoryStore:
    """Return a store with two incremental backups, the second of which has grains of both."""
    bench.run(vm, id="b1", mode="incremental")
    vm.raws[0] = bytes(changed(vm.raws[0], 3, 4, 30))
    vcenter.upload(vm.machine.disks[0].file, stream_optimized(vm.raws[0]), vm.machine.datacenter)
    bench.run(vm, id="b2", mode="incremental")
    assert isinstance(bench.primary, MemoryStore)
    return bench.primary


def send(store: MemoryStore, url: str) -> dict[str, object]:
    """Upload the second backup."""
    named = {"kind": "backup", "account": "acme", "volume": "vol1", "id": "b2", "fmt": "ova", "url": url}
    return upload.run(parse_request(upload.Request, named, "upload"), attempt(store))


def members(data: bytes) -> dict[str, bytes]:
    """Return tar's list of the package's members, in order."""
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return {each.name: opened.extractfile(each).read() for each in opened}  # type: ignore[union-attr]


def test_package(store: MemoryStore, vm: TestVM, http_server: HttpServer, tmp_path: Path) -> None:
    """qemu-img finds the VM's disks, the descriptor has all sizes, and the last .mf has all digests."""
    result = send(store, http_server.take("up"))

    data = http_server.stored["/up"]
    found = members(data)
    assert list(found) == ["b2.ovf", *FILES, "b2.mf"]
    assert (result["size"], result["digest"]) == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
    assert read_sizes(found["b2.ovf"], "b2.ovf") == {name: len(found[name]) for name in FILES}
    assert list(read_descriptor(found["b2.ovf"], "b2.ovf").disks) == FILES[:2]
    assert {name: each.hex for name, each in read_checksums(found["b2.mf"], "b2.mf").items()} == {
        name: hashlib.sha256(found[name]).hexdigest() for name in ("b2.ovf", *FILES)
    }
    for number, raw in enumerate(vm.raws):
        (tmp_path / "disk.vmdk").write_bytes(found[f"b2-disk{number}.vmdk"])
        (tmp_path / "raw").write_bytes(raw)
        assert_same_disk(tmp_path / "disk.vmdk", "vmdk", tmp_path / "raw")


def test_package_can_be_downloaded(store: MemoryStore, http_server: HttpServer) -> None:
    """The download job accepts the package with its digests, although the .mf is last."""
    send(store, http_server.take("up"))
    fields = {"url": http_server.serve("b2.ova", http_server.stored["/up"]), "account": "acme", "id": "t1"}
    here = MemoryStore("primary")

    download.run(parse_request(download.Request, fields, "download"), attempt(here))

    sent = members(http_server.stored["/up"])["b2-disk1.vmdk"]
    assert read_bytes(here, "template/tmpl/acme/t1/t1-disk1.vmdk") == sent


def test_damaged_pack(store: MemoryStore, http_server: HttpServer) -> None:
    """A damaged pack is detected during the upload, and nothing arrives."""
    for key in packs(store):
        data = bytearray(read_bytes(store, key))
        data[200] ^= 1
        put_bytes(store, key, bytes(data), OWNER)

    with pytest.raises(CorruptImage, match="pack"):
        send(store, http_server.take("up"))

    assert http_server.stored == {}


def test_other_zlib(bench: Bench, http_server: HttpServer, vm: TestVM, vcenter: VCenterSimulator) -> None:
    """Grains of any length are sent as they are stored, and their sizes are known in advance."""
    noise = os.urandom(33 * GRAIN)
    vcenter.upload(vm.machine.disks[0].file, stream_optimized(noise.ljust(40 * GRAIN, b"\0")), vm.machine.datacenter)
    bench.run(vm, id="b2", mode="incremental")
    send(bench.primary, http_server.take("up"))
    assert len(members(http_server.stored["/up"])["b2-disk0.vmdk"]) > 33 * GRAIN


def test_grain_map_alone(store: MemoryStore, http_server: HttpServer) -> None:
    """A grain map is no independent file, so its upload is refused and nothing is sent."""
    key = next(each.key for each in store.list("snapshots/acme/vol1/b2") if each.key.endswith(".grains"))
    request = parse_request(upload.Request, {"key": key, "url": http_server.take("put")}, "upload")
    with pytest.raises(InvalidRequest, match="stored in packs"):
        upload.run(request, attempt(store))
