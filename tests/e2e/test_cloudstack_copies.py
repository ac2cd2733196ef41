"""Copies, moves and splits for a management server, run by a real worker."""

from __future__ import annotations

import filecmp
import os
import random
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.demo.cloudstack.management import make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from ssvm_worker.wiring.stores import open_store_named
from tests.archives import ova_of, ovf_with_hardware
from tests.cloudstack_commands import PARENT
from tests.images import qcow2, qcow2_backed_by, stream_optimized
from tests.servers.agent import running_agent, section_for
from tests.servers.http import HttpServer
from tests.servers.s3 import S3Server
from tests.servers.worker import Site
from tests.unit.cloudstack.commands.agents import NFS, PLACE, Agent, data_object, java_template, java_volume, s3_object
from tests.unit.cloudstack.recorded import DATA as DATA_FILES
from tests.unit.cloudstack.recorded import conversations, vectors
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e

SECOND = "nfs://192.0.2.11/export/sec2"
CACHE = {"com.cloud.agent.api.to.NfsTO": {"_url": SECOND, "_role": "ImageCache"}}
IMAGE = {"com.cloud.agent.api.to.NfsTO": {"_url": SECOND, "_role": "Image"}}
ROOT, DATA = stream_optimized(random.Random(5).randbytes(300_000)), stream_optimized(b"", 1 << 30)
#: The capacity of ROOT. What the disk says is more certain than what the OVF says.
ROOT_CAPACITY = 300_032
OVA = ova_of({"vm.ovf": ovf_with_hardware("root.vmdk", "data.vmdk"), "root.vmdk": ROOT, "data.vmdk": DATA})
DISK, CAPACITY = qcow2(), 1 << 20


@dataclass
class Zone:
    """A worker, an agent, and two stores in directories that the server calls NFS exports."""

    site: Site
    agent: Agent
    second: Path

    def send(self, command: str, **fields: Any) -> dict[str, Any]:
        """Return the answer. It must be a success."""
        answer = self.agent.send(command, **fields)
        assert answer["result"] is True, answer
        return answer

    def copy(self, kind: str, path: str, target: dict[str, Any], to: str, **fields: Any) -> dict[str, Any]:
        """Send a CopyCommand from the first store, and return the new data without its class."""
        source = _with(data_object(kind, path, fields.pop("source", NFS)), **fields)
        answer = self.send("CopyCommand", srcTO=source, destTO=data_object(kind, to, target), wait=1800)
        assert answer["class"] == "CopyCmdAnswer"
        (new,) = answer["newData"].values()
        return new

    def files(self) -> dict[str, bytes]:
        """Return the files of the second store."""
        return {
            str(each.relative_to(self.second)): each.read_bytes() for each in self.second.rglob("*") if each.is_file()
        }


def _with(data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {name: content | fields for name, content in data.items()}


@pytest.fixture
def zone(make_site: Callable[..., Site], tmp_path: Path) -> Zone:
    """A zone with a running worker."""
    second = tmp_path / "second"
    second.mkdir()
    stores = {"second": {"url": f"file://{second}"}}
    site = make_site(cloudstack={"stores": {PLACE: "primary", SECOND: "second"}}, stores=stores)
    site.start()
    return Zone(site, Agent(site.settings), second)


def _download(zone: Zone, url: str, **changes: Any) -> dict[str, Any]:
    command = {
        "url": url,
        "_store": NFS,
        "resourceType": "TEMPLATE",
        "installPath": "template/tmpl/2/202",
        "format": "OVA",
        "name": "202-2-aaaa",
        "id": 202,
        "accountId": 2,
    } | changes
    answer = zone.send("DownloadCommand", **command)

    def ask(request: str) -> bool:
        answer.update(zone.send("DownloadProgressCommand", **command, request=request, jobId=answer["jobId"]))
        assert answer["downloadStatus"] != "DOWNLOAD_ERROR", answer
        return bool(answer["downloadStatus"] == "DOWNLOADED")

    zone.site.until(lambda: ask("GET_STATUS"), "the download has ended")
    assert ask("PURGE")
    return answer


def test_ova_with_two_disks(zone: Zone, http_server: HttpServer) -> None:
    """An OVA becomes a template for each disk, and the server can list, link and delete both."""
    done = _download(zone, http_server.serve("a.ova", OVA))
    assert done["installPath"] == "template/tmpl/2/202/202.ova"
    assert (zone.site.store / done["installPath"]).read_bytes() == OVA
    parent = {"id": 202, "accountId": 2, "uniqueName": "202-2-aaaa", "size": 1 << 30}
    data = _with(data_object("Template", done["installPath"]), **parent)
    disks = zone.send("GetDatadisksCommand", data=data)["dataDiskDetails"]
    assert done["ovfInformationTO"]["disks"] == disks
    assert [(each["diskId"], each["bootable"], each["diskNumber"]) for each in disks] == [
        ("vmdisk0", True, 0),
        ("vmdisk1", False, 1),
    ]
    assert {(each["diskController"], each["diskControllerSubType"]) for each in disks} == {
        ("SCSI Controller 0", "lsilogic")
    }
    assert [each["fileSize"] for each in disks] == [len(ROOT), len(DATA)]
    child = data_object("Template", "template/tmpl/2/203")
    child = _with(child, id=203, accountId=2, uniqueName="203-2-bbbb", size=disks[1]["virtualSize"])
    made = []
    for template, disk in ((data, disks[0]), (child, disks[1])):
        made.append(
            zone.send(
                "CreateDatadiskTemplateCommand",
                dataDiskTemplate=template,
                path=f"/mnt/SecStorage/211a4e01-cf68-3a99-9f57-f56c563748d4/{disk['path']}",
                fileSize=disk["fileSize"],
                bootable=disk["bootable"],
                diskId=disk["diskId"],
            )["dataDiskTemplate"]
        )
    assert [(each["id"], each["path"]) for each in made] == [
        (202, done["installPath"]),
        (203, "template/tmpl/2/203/203.ova"),
    ]
    infos = zone.send("ListTemplateCommand", store=NFS)["templateInfos"]
    assert {name: each["installPath"] for name, each in infos.items()} == {
        "202-2-aaaa": done["installPath"],
        "203-2-bbbb": "template/tmpl/2/203/203.ova",
    }
    assert not any(each["isCorrupted"] for each in infos.values())
    zone.send(
        "CreateEntityDownloadURLCommand",
        installPath=done["installPath"],
        filenameInExtractURL="a.ova",
        filepathInExtractURL="5d6e7f80",
        data=data,
    )
    for template in (child, data):
        zone.send("DeleteCommand", data=template)
    assert zone.send("ListTemplateCommand", store=NFS)["templateInfos"] == {}


def test_template_between_stores(zone: Zone, http_server: HttpServer) -> None:
    """A template of a worker is copied with its manifest, and listed at the other store under the same name."""
    done = _download(zone, http_server.serve("a.qcow2", DISK), format="QCOW2")
    new = zone.copy("Template", done["installPath"], IMAGE, "template/tmpl/2/202", format="QCOW2")
    assert new["path"] == done["installPath"]
    assert (new["size"], new["physicalSize"], new["format"]) == (CAPACITY, len(DISK), "QCOW2")
    assert zone.send("ListTemplateCommand", store=IMAGE)["templateInfos"].keys() == {"202-2-aaaa"}
    read_manifest(open_store_named(zone.site.settings, "second"), Artifact("template", "2", "202"))


def test_java_artifacts_between_stores(zone: Zone) -> None:
    """A template and a volume of the Java agent are copied with all files, by their file or their directory."""
    java_template(zone.site.store, 2, 7, "7-2-aaaa")
    java_volume(zone.site.store, 2, 31, "31-2-aaaa")
    template = zone.copy("Template", "template/tmpl/2/7/9e8d.qcow2", IMAGE, "template/tmpl/2/7", size=5)
    assert (template["path"], template["size"]) == ("template/tmpl/2/7/9e8d.qcow2", 1 << 30)
    volume = zone.copy("Volume", "volumes/2/31", IMAGE, "volumes/2/31")
    assert (volume["path"], volume["size"]) == ("volumes/2/31/9e8d.qcow2", 1 << 30)
    assert zone.files() == {
        str(each.relative_to(zone.site.store)): each.read_bytes()
        for each in zone.site.store.rglob("*")
        if each.is_file()
    }


def test_snapshots_between_stores(zone: Zone) -> None:
    """A snapshot is copied: the file of KVM, that of XenServer with its extension, and the directory of an OVF."""
    files = {"5f2b": b"kvm", "6a7c.vhd": b"xen", "s/s.ovf": b"ovf", "s/s-disk0.vmdk": b"disk", "s/s.mf": b"mf"}
    for name, data in files.items():
        file = zone.site.store / "snapshots/2/31" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    expected = {"5f2b": "5f2b", "6a7c": "6a7c.vhd", "s/s": "s/s"}
    for path, new in expected.items():
        answer = zone.copy("Snapshot", f"snapshots/2/31/{path}", IMAGE, "snapshots/2/31")
        assert answer["path"] == f"snapshots/2/31/{new}"
        assert answer["physicalSize"] == (9 if path == "s/s" else 3)
    assert zone.files() == {f"snapshots/2/31/{name}": data for name, data in files.items()}


def test_backup_between_stores(zone: Zone, http_server: HttpServer) -> None:
    """A snapshot that is a backup of a worker is copied with its manifest."""
    from tests.copies import store_artifact

    backup = Artifact("backup", "2", "s", "31")
    store_artifact(open_store_named(zone.site.settings, "primary"), {"s.ovf": b"ovf"}, backup)
    answer = zone.copy("Snapshot", "snapshots/2/31/s/s", IMAGE, "snapshots/2/31")
    assert answer["path"] == "snapshots/2/31/s/s"
    read_manifest(open_store_named(zone.site.settings, "second"), backup)


def test_s3(zone: Zone, s3_server: S3Server) -> None:
    """Artifacts of the Java agent are copied from its S3 to a cache, and from a cache to S3."""
    bucket = s3_object(s3_server, s3_server.make_bucket())
    java_template(zone.site.store, 2, 7, "7-2-aaaa")
    to_s3 = zone.copy("Template", "template/tmpl/2/7/9e8d", bucket, "template/tmpl/2/7", size=1 << 30, format="QCOW2")
    assert to_s3["path"] == "template/tmpl/2/7/9e8d.qcow2"
    back = zone.copy("Template", to_s3["path"], CACHE, "template/tmpl/2/7", source=bucket, size=1 << 30)
    assert (back["path"], back["size"]) == ("template/tmpl/2/7/9e8d.qcow2", 1 << 30)
    assert zone.files() == {"template/tmpl/2/7/9e8d.qcow2": b"xxx"}
    (zone.site.store / "volumes/2/31").mkdir(parents=True)
    (zone.site.store / "volumes/2/31/My disk (1).ova").write_bytes(b"odd")
    odd = zone.copy("Volume", "volumes/2/31/My disk (1).ova", bucket, "volumes/2/31", size=3)
    assert zone.copy("Volume", odd["path"], CACHE, "volumes/2/31", source=bucket, size=3)["path"] == odd["path"]
    assert (zone.second / odd["path"]).read_bytes() == b"odd"
    (zone.second / "snapshots/2/31").mkdir(parents=True)
    (zone.second / "snapshots/2/31/5f2b").write_bytes(b"snapshot")
    snapshot = zone.copy("Snapshot", "snapshots/2/31/5f2b", bucket, "snapshots/2/31", source=CACHE)
    again = zone.copy("Snapshot", snapshot["path"], NFS, "snapshots/2/31", source=bucket)
    assert (zone.site.store / again["path"]).read_bytes() == b"snapshot"
    shown = str([each.request for each in zone.site.ledger.page()])
    assert s3_server.secret_key not in shown


@pytest.mark.parametrize("name", ["5f2b", "5f2b_temp"])
def test_template_of_a_snapshot(zone: Zone, name: str) -> None:
    """A snapshot of KVM becomes a template that is listed, and only a temporary source is removed."""
    source = zone.site.store / "snapshots/2/31" / name
    source.parent.mkdir(parents=True)
    source.write_bytes(DISK)
    volume = {"format": "QCOW2", "id": 31}
    snapshot = _with(data_object("Snapshot", f"snapshots/2/31/{name}"), hypervisorType="KVM", volume=volume)
    template = _with(data_object("Template", "template/tmpl/2/203", IMAGE), name="203-2-bbbb")
    answer = zone.send("CopyCommand", srcTO=snapshot, destTO=template)
    (new,) = answer["newData"].values()
    assert (new["path"], new["format"]) == ("template/tmpl/2/203/203.qcow2", "QCOW2")
    assert (new["size"], new["physicalSize"]) == (CAPACITY, len(DISK))
    infos = zone.send("ListTemplateCommand", store=IMAGE)["templateInfos"]
    assert infos["203-2-bbbb"]["installPath"] == new["path"]
    assert source.exists() is (name == "5f2b")


def test_snapshot_with_a_backing_file(zone: Zone) -> None:
    """A snapshot that depends on another file is no template, and the answer says why."""
    source = zone.site.store / "snapshots/2/31/5f2b"
    source.parent.mkdir(parents=True)
    source.write_bytes(qcow2_backed_by("/a/base"))
    snapshot = _with(data_object("Snapshot", "snapshots/2/31/5f2b"), hypervisorType="KVM")
    answer = zone.agent.send(
        "CopyCommand", srcTO=snapshot, destTO=data_object("Template", "template/tmpl/2/203", IMAGE)
    )
    assert (answer["class"], answer["result"]) == ("CopyCmdAnswer", False)
    assert "backing" in answer["details"] or "another file" in answer["details"]
    assert zone.files() == {}


def test_move_volume(zone: Zone) -> None:
    """A volume moves to another account and back, and no file stays at the old place."""
    java_volume(zone.site.store, 2, 31, "31-2-aaaa")
    there = {"volumeName": "v", "volumeUuid": "22222222", "datastoreUri": PLACE}
    for old, new in (
        ("volumes/2/31", "volumes/3/31"),
        ("volumes/3/31", "volumes/2/31"),
        ("volumes/2/31", "volumes/3/31"),
    ):
        answer = zone.send("MoveVolumeCommand", srcPath=old, destPath=new, **there)
        assert (answer["class"], answer["details"]) == ("Answer", f"Moved volume v from {old} to {new}.")
        assert {each.rpartition("/")[0] for each in zone.site.files()} == {new}


def test_link_to_a_vmware_volume(zone: Zone) -> None:
    """A volume of OVF and VMDK is packed for its first link, and deleted with the link."""
    path = "volumes/2/31/5f2b"
    folder = zone.site.store / path
    folder.mkdir(parents=True)
    files = {"5f2b.ovf": ovf_with_hardware("5f2b-disk0.vmdk"), "5f2b-disk0.vmdk": ROOT}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    link = {"filenameInExtractURL": "v.ova", "filepathInExtractURL": "a1b2c3d4"}
    for _ in range(2):
        zone.send("CreateEntityDownloadURLCommand", installPath=path, data=data_object("Volume", path), **link)
        with tarfile.open(folder / "5f2b.ova") as package:
            assert package.getnames() == list(files)
    assert [each.job for each in zone.site.ledger.page()] == ["transfer"]
    url = "http://192.0.2.77/userdata/a1b2c3d4/v.ova"
    zone.send("DeleteEntityDownloadURLCommand", extractUrl=url, type="VOLUME", path=path, parentPath=PARENT)
    assert set(zone.site.files()) <= {".ssvm-store"}


def test_same_command_attaches(zone: Zone) -> None:
    """A command that is sent again while its job runs waits for the same job."""
    java_template(zone.site.store, 2, 7, "7-2-aaaa", size=50_000_000)
    answers: list[dict[str, Any]] = []
    command = {
        "srcTO": data_object("Template", "template/tmpl/2/7/9e8d.qcow2"),
        "destTO": data_object("Template", "template/tmpl/2/7", IMAGE),
    }
    threads = [threading.Thread(target=lambda: answers.append(zone.send("CopyCommand", **command))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({str(each["newData"]) for each in answers}) == 1
    assert sum(each.result["bytes"] > 0 for each in zone.site.ledger.page() if each.result) == 1


def test_killed_worker(zone: Zone) -> None:
    """The worker dies in the middle of a copy: the answer is a success of the next worker, and no part stays."""
    file = zone.site.store / "snapshots/2/31/5f2b"
    file.parent.mkdir(parents=True)
    file.write_bytes(os.urandom(32 << 20) * 8)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: answers.append(zone.copy("Snapshot", "snapshots/2/31/5f2b", IMAGE, "snapshots/2/31"))
    )
    thread.start()
    zone.site.until(lambda: any(each.suffix == ".part" for each in zone.second.rglob("*")), "the copy has begun")
    zone.site.workers[0].kill()
    assert not answers
    zone.site.start()
    thread.join(PATIENCE_S)
    assert [each["physicalSize"] for each in answers] == [file.stat().st_size]
    assert [each.name for each in zone.second.rglob("*") if each.is_file()] == ["5f2b"]
    assert filecmp.cmp(file, zone.second / "snapshots/2/31/5f2b", shallow=False)
    (record,) = zone.site.ledger.page()
    assert record.attempted == 2


def _recorded(name: str) -> list[RawMessage]:
    """Return the messages of this class in the conversations of the Java agent, in their order."""
    return [
        message
        for conversation, frames in sorted(conversations().items())
        if conversation.startswith("real-ssvm")
        for frame in frames
        for message in frame.frame().messages
        if message.short == name
    ]


def test_recorded_data_disk(zone: Zone) -> None:
    """The answer to a recorded command is that of the Java agent, except that its path has a file."""
    command, expected = (_recorded(f"CreateDatadiskTemplate{kind}")[0] for kind in ("Command", "Answer"))
    template = next(iter(command.content["dataDiskTemplate"].values()))
    folder = zone.site.store / "template/tmpl/1/224"
    folder.mkdir(parents=True)
    package = Path(template["path"]).name
    ovf = ovf_with_hardware("t-disk1.vmdk").replace(b"vmdisk0", b"vmdisk1")
    for name, data in {"t.ovf": ovf, "t-disk1.vmdk": bytes(65536), package: b"package"}.items():
        (folder / name).write_bytes(data)
    answer = zone.agent.dispatch(command)
    new = answer.content.pop("dataDiskTemplate")
    java = expected.content.pop("dataDiskTemplate")
    assert (zone.site.store / new.pop("path")).is_file()
    assert not (zone.site.store / java.pop("path")).exists()
    assert (answer.name, new, answer.content) == (expected.name, java, expected.content)
    lines = set((folder / "template.properties").read_text().splitlines())
    recorded = (DATA_FILES / "files/template.properties.ova").read_text().splitlines()
    assert {each.partition("=")[0] for each in lines} >= {each.partition("=")[0] for each in recorded}
    infos = zone.send("ListTemplateCommand", store=NFS)["templateInfos"]
    assert infos.keys() == {template["uniqueName"]}, "the Java agent's ova=false hides the template"


VECTORS = ("req-copy-snapshot-nfs-to-s3", "req-copy-template-cache-to-s3", "req-copy-volume-nfs-to-nfs")
ANSWERS = ("ans-copy-snapshot", "ans-copy-template", "ans-copy-volume")


@pytest.mark.parametrize(("name", "expected"), list(zip(VECTORS, ANSWERS, strict=True)))
def test_vectors(zone: Zone, s3_server: S3Server, name: str, expected: str) -> None:
    """A command of CloudStack's own classes copies to S3 or NFS, and the answer has the fields of its classes."""
    (message,) = vectors()[name][0].frame().messages
    bucket = s3_object(s3_server, s3_server.make_bucket())

    def adapted(value: Any, place: dict[str, Any]) -> Any:
        if not isinstance(value, dict):
            return value
        if any(each.endswith(("NfsTO", "S3TO")) for each in value):
            return bucket if any(each.endswith("S3TO") for each in value) else place
        return {each: adapted(inner, place) for each, inner in value.items()}

    content = {each: adapted(inner, NFS if each == "srcTO" else IMAGE) for each, inner in message.content.items()}
    source = next(iter(content["srcTO"].values()))["path"]
    path = zone.site.store / (source if source.endswith(".ova") else f"{source}.ovf")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"data")
    answer = zone.agent.dispatch(RawMessage(message.name, content))
    ((kind, new),) = answer.content["newData"].items()
    ((kind_of_java, java),) = vectors()[expected][0].frame().messages[0].content["newData"].items()
    assert (answer.content["result"], kind, new.keys()) == (True, kind_of_java, java.keys())
    assert new["path"] == source
    assert zone.send("ListDataStoreObjectsCommand", store=IMAGE if "nfs-to-nfs" in name else bucket, path="/")["count"]


def test_story_of_an_ova(make_site: Callable[..., Site], tmp_path: Path, http_server: HttpServer) -> None:
    """A server registers an OVA for VMware, which becomes ready with a template of its data disk, moves, and goes."""
    second = tmp_path / "second"
    second.mkdir()
    with make_management_server(tmp_path / "ca", times=ServerTimes(poll=0.2, ping_timeout=PATIENCE_S)) as server:
        rows = [server.zone.add_store(place) for place in (PLACE, SECOND)]
        section = section_for(server, stores={PLACE: "primary", SECOND: "second"})
        site = make_site(cloudstack=section, stores={"second": {"url": f"file://{second}"}})
        site.start()
        with running_agent(site.settings):
            server.wait_up(timeout=PATIENCE_S)
            parent = server.register_template(http_server.serve("a.ova", OVA), "OVA", hypervisor="VMware")
            server.wait_ready(parent, PATIENCE_S)
            (child,) = parent.children
            assert child.ready
            assert (parent.size, child.size) == (ROOT_CAPACITY, 1 << 30)
            assert (site.store / parent.install_path).read_bytes() == OVA
            assert server.move_to_store(child, rows[1]).ok
            assert sorted(each.name for each in second.rglob("*.vmdk")) == [f"{parent.id}-disk1.vmdk"]
            for entity in (child, parent):
                assert server.delete(entity).ok
        assert server.zone.problems == []
    assert [*second.rglob("*.vmdk"), *site.store.rglob("*.vmdk")] == []
