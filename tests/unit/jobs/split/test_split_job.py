"""Each disk of an OVA becomes a separate template, as CloudStack's Java agent leaves it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import read_draft, read_manifest
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, StoreUnavailable, UnsafeImage
from ssvm_worker.formats import ova
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.split import job as split
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes
from tests.archives import ova_of, ovf_with_hardware
from tests.attempts import attempt
from tests.contracts.store import put
from tests.copies import content
from tests.documents import check_document
from tests.images import iso, stream_optimized
from tests.servers.http import HttpServer

ROOT, DATA = stream_optimized(random.Random(5).randbytes(300_000)), stream_optimized(b"", 1 << 30)
OVF = ovf_with_hardware("root.vmdk", "data.vmdk")
OVA, OF_ROOT, OF_DATA = Artifact("template", "2", "7"), "template/tmpl/2/7", "template/tmpl/2/9"


class Renameless(MemoryStore):
    """A store that cannot rename, like S3."""

    rename = None  # type: ignore[assignment]


@pytest.fixture(params=["file", "memory", "renameless"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of each kind."""
    if request.param == "file":
        return FileStore("primary", tmp_path)
    return MemoryStore("primary") if request.param == "memory" else Renameless("primary")


def download_ova(server: HttpServer, store: Store) -> None:
    """Download an OVA with two disks."""
    package = ova_of({"vm.ovf": OVF, "root.vmdk": ROOT, "data.vmdk": DATA})
    asked = {"url": server.serve("vm.ova", package), "account": 2, "id": "7", "keep_package": True}
    download.run(parse_request(download.Request, asked, "download"), attempt(store))


def java_ova(store: Store, ovf: bytes = OVF) -> None:
    """Store an OVA with two disks as the Java agent does."""
    files = {"9e8d.ova": b"package", "vm.ovf": ovf, "root.vmdk": ROOT, "data.vmdk": DATA}
    for name, data in (files | {"template.properties": b"uniquename=7-2-aa\n"}).items():
        put(store, f"{OF_ROOT}/{name}", data)


def run(store: Store, disk: str, template: str, **options: Any) -> dict[str, Any]:
    """Make a template of a disk."""
    fields = {"account": "2", "id": "7", "disk": disk, "template": template, "unique_name": f"{template}-2-aa"}
    result = split.run(parse_request(split.Request, fields, "split"), attempt(store, **options))
    check_document("split.result", result)
    return result


@pytest.mark.parametrize("order", [("root", "data"), ("data", "root")], ids="-".join)
def test_two_disks(http_server: HttpServer, store: Store, order: tuple[str, str]) -> None:
    """Both templates have an OVF of one disk, valid digests and CloudStack's files, in any order of the commands."""
    download_ova(http_server, store)
    package = read_bytes(store, f"{OF_ROOT}/7.ova")
    for name in order:
        run(store, *(("7-disk0.vmdk", "7") if name == "root" else ("7-disk1.vmdk", "9")))
    for prefix, disk, data in ((OF_ROOT, "7-disk0.vmdk", ROOT), (OF_DATA, "7-disk1.vmdk", DATA)):
        manifest = read_manifest(store, Artifact.of_prefix(prefix))
        assert ova.read_descriptor(read_bytes(store, f"{prefix}/7.ovf"), "").disks == (disk,)
        assert len(ova.read_descriptor(read_bytes(store, f"{prefix}/7.ovf.orig"), "").disks) == 2
        assert read_bytes(store, f"{prefix}/{disk}") == data
        assert set(ova.read_checksums(read_bytes(store, f"{prefix}/7.mf"), "")) == {"7.ovf", disk}
        assert {f"{prefix}/{each.name}" for each in manifest.entries} | {f"{prefix}/manifest.json"} == {
            each.key for each in store.list(prefix)
        }
        number = prefix.rpartition("/")[2]
        assert manifest.facts["unique_name"] == f"{number}-2-aa"
        verify.run(
            parse_request(verify.Request, {"account": "2", "id": number, "kind": "template"}, "verify"), attempt(store)
        )
    assert read_bytes(store, f"{OF_ROOT}/7.ova") == package


def test_result_and_properties(http_server: HttpServer, store: Store) -> None:
    """The result has the sizes of the disk, and CloudStack finds the template by its unique name."""
    download_ova(http_server, store)
    result = run(store, "7-disk1.vmdk", "9")
    assert (result["package"], result["size"], result["virtual_size"]) == (f"{OF_DATA}/9.ova", len(DATA), 1 << 30)
    lines = set(read_bytes(store, f"{OF_DATA}/template.properties").decode().splitlines())
    assert {"id=9", "uniquename=9-2-aa", "ova=true", "ova.filename=9.ova", f"ova.size={len(DATA)}"} <= lines
    meta = read_bytes(store, f"{OF_DATA}/9.ova.meta").decode().splitlines()
    assert meta == [
        *("ova.filename=9.ova", "version=1.0", "ovf=7.ovf", "numDisks=1", "disk1.name=7-disk1.vmdk"),
        f"disk1.size={len(DATA)}",
    ]


def test_again(http_server: HttpServer, store: Store) -> None:
    """A repeated split changes nothing and has the same result."""
    download_ova(http_server, store)
    for disk, template in (("7-disk1.vmdk", "9"), ("7-disk0.vmdk", "7")):
        first = run(store, disk, template)
        before = {key: data for key, data in content(store).items() if not key.endswith("manifest.json")}
        assert run(store, disk, template) == first
        assert {key: data for key, data in content(store).items() if not key.endswith("manifest.json")} == before


def test_java_ova(store: Store) -> None:
    """An OVA of the Java agent is split too, without manifests, and its package keeps its name."""
    java_ova(store)
    assert run(store, "data.vmdk", "9")["package"] == f"{OF_DATA}/9.ova"
    assert run(store, "root.vmdk", "7")["package"] == f"{OF_ROOT}/9e8d.ova"
    names = {key.removeprefix("template/tmpl/2/") for key in content(store)}
    common = ("vm.ovf", "vm.ovf.orig", "template.properties")
    assert names == {
        *(f"7/{name}" for name in (*common, "9e8d.ova", "9e8d.ova.meta", "root.vmdk")),
        *(f"9/{name}" for name in (*common, "9.ova.meta", "data.vmdk")),
    }
    lines = read_bytes(store, f"{OF_ROOT}/template.properties").decode().splitlines()
    assert {"ova=true", "filename=9e8d.ova", "ova.size=7", f"ova.virtualsize={1 << 30}", "checksum="} <= set(lines)


def test_iso(http_server: HttpServer, store: Store) -> None:
    """An ISO image of an OVA becomes a separate template, and never replaces that of the OVA."""
    image = iso(1000)
    package = ova_of({"vm.ovf": ovf_with_hardware("root.vmdk", others=("a.iso",)), "root.vmdk": ROOT, "a.iso": image})
    asked = {"url": http_server.serve("vm.ova", package), "account": 2, "id": "7"}
    download.run(parse_request(download.Request, asked, "download"), attempt(store))
    with pytest.raises(InvalidRequest, match="separate"):
        run(store, "7-file0.iso", "7")
    result = run(store, "7-file0.iso", "9")
    assert (result["package"], result["size"], result["virtual_size"]) == (
        f"{OF_DATA}/7-file0.iso",
        len(image),
        len(image),
    )
    names = {key.rpartition("/")[2] for key in content(store) if key.startswith(OF_DATA)}
    assert names == {"7-file0.iso", "manifest.json", "template.properties"}
    assert b"iso=true\n" in read_bytes(store, f"{OF_DATA}/template.properties")
    assert run(store, "7-file0.iso", "9") == result
    verify.run(parse_request(verify.Request, {"account": "2", "id": "9", "kind": "template"}, "verify"), attempt(store))


class Interrupted(MemoryStore):
    """A store that fails at one write, counted from 1."""

    fails_at = 0

    def writer(self, key: str, *args: Any, **options: Any) -> Any:
        """Fail once."""
        self.fails_at -= 1
        if self.fails_at == 0:
            raise StoreUnavailable("The store fails", f"{self.name}:{key}")
        return super().writer(key, *args, **options)


@pytest.mark.parametrize("fails_at", range(1, 10))
def test_interrupted(http_server: HttpServer, fails_at: int) -> None:
    """A split that fails at any write loses no disk and no digest, and a retry completes it."""
    store = Interrupted("primary")
    download_ova(http_server, store)
    store.fails_at = fails_at
    with pytest.raises(StoreUnavailable):
        run(store, "7-disk1.vmdk", "9")
    run(store, "7-disk1.vmdk", "9")
    entry = read_manifest(store, Artifact("template", "2", "9")).entry("7-disk1.vmdk")
    assert entry is not None
    assert entry.digest.startswith("sha256:")
    assert read_bytes(store, f"{OF_DATA}/7-disk1.vmdk") == DATA
    assert read_manifest(store, OVA).entry("7-disk1.vmdk") is None
    assert read_draft(store, Artifact("template", "2", "9")) is None


@pytest.mark.parametrize(
    "ovf",
    [
        OVF.replace(b"data.vmdk", b"../8/data.vmdk"),
        b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + OVF[39:],
    ],
    ids=["a path", "an entity"],
)
def test_hostile_ovf(store: Store, ovf: bytes) -> None:
    """A hostile OVF of another program changes nothing."""
    java_ova(store, ovf)
    before = content(store)
    with pytest.raises(UnsafeImage):
        run(store, "root.vmdk", "7")
    assert content(store) == before


def test_missing(store: Store) -> None:
    """A missing OVF, disk or file of a disk is an error, and changes no disk."""
    java_ova(store)
    with pytest.raises(ObjectNotFound):
        run(store, "third.vmdk", "9")
    store.delete(f"{OF_ROOT}/data.vmdk")
    with pytest.raises(ObjectNotFound, match="lacks a disk"):
        run(store, "data.vmdk", "9")
    store.delete(f"{OF_ROOT}/vm.ovf")
    store.delete(f"{OF_ROOT}/vm.ovf.orig")
    with pytest.raises(ObjectNotFound, match="no OVF"):
        run(store, "root.vmdk", "7")


@pytest.mark.parametrize("fields", [{"disk": "../../8/a.vmdk"}, {"template": "../8"}, {"disk": ""}])
def test_hostile_names(fields: dict[str, str]) -> None:
    """A disk or a template whose name is a path is refused."""
    good = {"account": "2", "id": "7", "disk": "a.vmdk", "template": "9"}
    with pytest.raises(InvalidRequest):
        parse_request(split.Request, good | fields, "split")
