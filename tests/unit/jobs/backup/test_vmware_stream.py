"""A stream that VMware's own software wrote, through backup, restore and download; and other writers and readers."""

from __future__ import annotations

import bz2
import shutil
import subprocess
from pathlib import Path

import pytest

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.formats import Inspection
from ssvm_worker.formats.extents import Extent, vmdk_extents
from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.formats.writers.vmdk import stream_optimized
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.restore import job as restore
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.units import GiB, KiB, MiB
from tests.archives import mf_of, ova_of, ovf_of
from tests.attempts import attempt
from tests.backup_bench import Bench, assert_whole
from tests.servers.http import HttpServer
from tests.servers.vcenter import TestVM

DATA = Path(__file__).parents[3] / "data/vmware"
#: 151 grains of a disk of 16 GiB. See README.md beside it.
GENUINE = bz2.decompress((DATA / "iotest-version3.vmdk.bz2").read_bytes())
CAPACITY = 16 * GiB
GRAIN = 64 * KiB


def grains(stream: bytes, capacity: int = CAPACITY) -> list[Extent]:
    """Return the grains of a stream, all inflated."""
    return list(vmdk_extents(iter([stream]), "disk", capacity))


@pytest.fixture
def vm(vcenter: VCenterSimulator, request: pytest.FixtureRequest) -> TestVM:
    """Return a VM whose disk the host sends as that stream."""
    name = f"genuine-{request.node.name.replace('[', '-').rstrip(']')}"
    return TestVM(vcenter.add_vm(name, [GENUINE], [CAPACITY]), [b""], [GENUINE])


def test_observed() -> None:
    """The verifier inflates every grain and has no warning."""
    verifier = StreamOptimized("disk", CAPACITY, inflate_every=1)
    verifier(GENUINE)
    verifier.finish()
    assert (verifier.grains, verifier.warnings) == (151, [])


@pytest.mark.plain_vcenter  # it compares the stream with VMware's
def test_full_backup_and_restore(bench: Bench, vm: TestVM) -> None:
    """A full backup has the host's bytes, its lease manifest agrees, and a restored VM has the same grains."""
    bench.run(vm)
    assert_whole(bench.primary, GENUINE)
    entry = read_manifest(bench.primary, bench.request(vm).artifact).entries[0]
    assert entry.facts["lease_manifest"] == "agreed"
    target = {"vcenter": "vc1", "name": f"{vm.machine.path.rpartition('/')[2]}-back", "pool": "DC0_C0"}
    backup = {"account": "acme", "volume": "vol1", "id": "b1"}
    made = restore.run(parse_request(restore.Request, backup | target, "restore"), bench.attempt())
    bench.run(vm, vm=made["vm"], id="b2")
    assert grains(read_bytes(bench.primary, "snapshots/acme/vol1/b2/b2-disk0.vmdk")) == grains(GENUINE)


def test_incremental_backup_and_restore(bench: Bench, vm: TestVM) -> None:
    """An incremental backup stores a grain once, and restores the disk."""
    bench.run(vm, mode="incremental")
    again = bench.run(vm, mode="incremental", id="b2")
    assert again["new_bytes"] == 0
    fields = {"account": "acme", "volume": "vol1", "id": "b2", "directory": "volumes/acme/r1", "format": "vmdk"}
    restore.run(parse_request(restore.Request, fields, "restore"), bench.attempt())
    (made,) = [each.key for each in bench.primary.list("volumes/acme/r1") if each.key.endswith(".vmdk")]
    assert grains(read_bytes(bench.primary, made)) == grains(GENUINE)


@pytest.mark.parametrize("packed", [False, True], ids=["vmdk", "ova"])
def test_download(http_server: HttpServer, tmp_path: Path, packed: bool) -> None:
    """A download accepts the stream, alone and in an OVA with checksums."""
    ovf = ovf_of("vm-disk1.vmdk").replace(b'ovf:size="1"', f'ovf:size="{len(GENUINE)}"'.encode())
    files = {"vm.ovf": ovf, "vm.mf": mf_of({"vm-disk1.vmdk": GENUINE, "vm.ovf": ovf}), "vm-disk1.vmdk": GENUINE}
    url = http_server.serve("image", ova_of(files) if packed else GENUINE)
    request = parse_request(download.Request, {"url": url, "account": 2, "id": "7"}, "download")
    result = download.run(request, attempt(FileStore("primary", tmp_path)))
    assert result["format"] == ("ova" if packed else "vmdk")


def test_reads_open_vmdk() -> None:
    """The reader accepts a stream of VMware's open-vmdk, which has its tables before the grains."""
    stream = bz2.decompress((DATA / "open-vmdk.vmdk.bz2").read_bytes())
    inspection = Inspection("auto", CAPACITY, "disk")
    inspection(stream)
    assert inspection.finish().virtual_size == 40 * MiB
    assert grains(stream, 40 * MiB) == [(each * GRAIN, bytes([each % 251]) * GRAIN) for each in (3, 511, 512, 639)]


@pytest.mark.install
def test_open_vmdk_reads_ours(tmp_path: Path) -> None:
    """VMware's open-vmdk reads a stream of the writer, and finds the same disk."""
    if not shutil.which("vmdk-convert"):
        pytest.skip("vmdk-convert is in no registry: build github.com/vmware/open-vmdk")
    content = [(each * GRAIN, bytes([each % 250 + 1]) * GRAIN) for each in (0, 1, 511, 512, 700)]
    capacity = 64 * MiB
    (tmp_path / "ours.vmdk").write_bytes(b"".join(stream_optimized(iter(content), capacity, "ours")))
    subprocess.run(["vmdk-convert", "ours.vmdk", "raw"], cwd=tmp_path, check=True, capture_output=True)
    raw = bytearray(capacity)
    for at, data in content:
        raw[at : at + GRAIN] = data
    assert (tmp_path / "raw").read_bytes() == raw
