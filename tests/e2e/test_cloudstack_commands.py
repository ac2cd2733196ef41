"""Commands of a management server, run by a real worker: on a directory, and on S3 by a name of the server."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.demo.cloudstack.management import make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from ssvm_worker.formats.writers.qcow2 import CLUSTER, qcow2
from ssvm_worker.units import MiB
from tests.servers.agent import running_agent, section_for
from tests.servers.http import HttpServer
from tests.servers.s3 import S3Server
from tests.servers.worker import Site
from tests.unit.cloudstack.commands.agents import NFS, PLACE, Agent, data_object, s3_object
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e

_ENDED = ("DOWNLOADED", "DOWNLOAD_ERROR")


@dataclass
class Zone:
    """A site with a worker, and an agent that sends commands to it."""

    site: Site
    agent: Agent
    store: dict[str, Any]

    def command(self, url: str, **changes: Any) -> dict[str, Any]:
        return {
            "url": url,
            "_store": self.store,
            "resourceType": "TEMPLATE",
            "installPath": "template/tmpl/2/202",
            "format": "QCOW2",
            "name": "202-2-aaaa",
            "id": 202,
            "accountId": 2,
            "followRedirects": False,
        } | changes

    def download(self, url: str, **changes: Any) -> dict[str, Any]:
        """Send the command and poll, as a server does. Return the last answer."""
        command = self.command(url, **changes)
        answers = [self.agent.send("DownloadCommand", **command)]
        request = {**command, "request": "GET_STATUS", "jobId": answers[0]["jobId"]}

        def ended() -> bool:
            answers.append(self.agent.send("DownloadProgressCommand", **request))
            return answers[-1]["downloadStatus"] in _ENDED

        self.site.until(ended, "the download has ended")
        return answers[-1]


def image() -> bytes:
    """Return a qcow2 image with 1 MiB of random data."""
    clusters = ((at, os.urandom(CLUSTER)) for at in range(0, MiB, CLUSTER))
    return b"".join(qcow2(clusters, 1 << 30, MiB // CLUSTER, "a.qcow2"))


@pytest.fixture
def zones(make_site: Callable[..., Site], s3_server: S3Server) -> Callable[[str], Zone]:
    """Makes zones on a directory or on S3."""

    def make(kind: str) -> Zone:
        site = make_site(cloudstack={"stores": {PLACE: "primary"}})
        site.start()
        store = NFS if kind == "directory" else s3_object(s3_server, s3_server.make_bucket())
        return Zone(site, Agent(site.settings), store)

    return make


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_life_of_a_template(zones: Callable[[str], Zone], http_server: HttpServer, kind: str) -> None:
    """A template is downloaded, listed, found without its job id, deleted, and downloaded again."""
    zone, data = zones(kind), image()
    url = http_server.serve("a.qcow2", data)
    done = zone.download(url)
    assert done["downloadStatus"] == "DOWNLOADED", done
    assert (done["templateSize"], done["templatePhySicalSize"]) == (1 << 30, len(data))
    assert done["checkSum"] == "{SHA-256}" + hashlib.sha256(data).hexdigest()
    assert done["installPath"] == "template/tmpl/2/202/202.qcow2"
    lost = zone.agent.send("DownloadProgressCommand", **zone.command(url), request="GET_OR_RESTART", jobId="jobid0000")
    assert lost["downloadStatus"] == "DOWNLOADED"
    infos = zone.agent.send("ListTemplateCommand", store=zone.store)["templateInfos"]
    assert infos.keys() == {"202-2-aaaa"}
    entry = infos["202-2-aaaa"]
    assert (entry["installPath"], entry["size"], entry["physicalSize"]) == (done["installPath"], 1 << 30, len(data))
    records = json.dumps([each.request for each in zone.site.ledger.page()])
    assert "secret" not in records
    deleted = zone.agent.send("DeleteCommand", data=data_object("Template", done["installPath"], zone.store))
    assert deleted["result"] is True, deleted
    assert zone.agent.send("ListTemplateCommand", store=zone.store)["templateInfos"] == {}
    assert zone.download(url)["downloadStatus"] == "DOWNLOADED"
    if kind == "directory":
        text = (zone.site.store / "template/tmpl/2/202/template.properties").read_text()
        assert "uniquename=202-2-aaaa\n" in text


def test_checksum_of_another_agent(zones: Callable[[str], Zone], http_server: HttpServer) -> None:
    """The server repeats the checkSum of an answer in the next command: ours and the Java agent's are accepted."""
    zone, data = zones("directory"), gzip.compress(image())
    url = http_server.serve("a.qcow2.gz", data)
    ours = "{SHA-256}" + hashlib.sha256(data).hexdigest()
    javas = "{SHA-512}" + hashlib.sha512(data).hexdigest()
    first = zone.download(url)
    assert (first["downloadStatus"], first["checkSum"]) == ("DOWNLOADED", ours), "that of the file at the URL"
    for known in (ours, javas):
        place = data_object("Template", first["installPath"], zone.store)
        assert zone.agent.send("DeleteCommand", data=place)["result"] is True
        again = zone.download(url, checksum=known)
        assert (again["downloadStatus"], again["checkSum"]) == ("DOWNLOADED", known), again
    other = zone.download(url, checksum=javas[:-8] + "00000000", installPath="template/tmpl/2/204", id=204)
    assert other["downloadStatus"] == "DOWNLOAD_ERROR"


def test_volume(zones: Callable[[str], Zone], http_server: HttpServer) -> None:
    """A volume is downloaded, listed by its id, and deleted."""
    zone = zones("directory")
    names = {"resourceType": "VOLUME", "installPath": "volumes/2/31", "id": 31, "name": "data-1"}
    done = zone.download(http_server.serve("v.qcow2", image()), **names)
    assert (done["downloadStatus"], done["installPath"]) == ("DOWNLOADED", "volumes/2/31/31.qcow2"), done
    infos = zone.agent.send("ListVolumeCommand", store=zone.store)["templateInfos"]
    assert {key: each["templateName"] for key, each in infos.items()} == {"31": "data-1"}
    assert zone.agent.send("ListTemplateCommand", store=zone.store)["templateInfos"] == {}
    assert zone.agent.send("DeleteCommand", data=data_object("Volume", done["installPath"]))["result"] is True
    assert zone.agent.send("ListVolumeCommand", store=zone.store)["templateInfos"] == {}


def test_checksum_and_404(zones: Callable[[str], Zone], http_server: HttpServer) -> None:
    """A wrong checksum and a missing file are errors of the download with their reasons."""
    zone, data = zones("directory"), image()
    url = http_server.serve("a.qcow2", data)
    wrong = zone.download(url, checksum="{SHA-256}" + "0" * 64)
    assert wrong["downloadStatus"] == "DOWNLOAD_ERROR"
    assert "checksum is wrong" in wrong["errorString"]
    missing = zone.download(http_server.url("missing"), installPath="template/tmpl/2/203", id=203)
    assert missing["downloadStatus"] == "DOWNLOAD_ERROR"
    assert "404" in missing["errorString"]
    assert zone.agent.send("ListTemplateCommand", store=zone.store)["templateInfos"] == {}


def test_redirect_is_refused(zones: Callable[[str], Zone], http_server: HttpServer) -> None:
    """A redirect is an error if the server does not allow it, and is followed otherwise."""
    zone, data = zones("directory"), image()
    http_server.serve("a.qcow2", data)
    url = http_server.redirect("moved", http_server.url("a.qcow2"))
    assert zone.download(url)["downloadStatus"] == "DOWNLOAD_ERROR"
    assert zone.download(url, followRedirects=True, name="other")["downloadStatus"] == "DOWNLOADED"


#: The objects of a store, and what the deletion of each object removes.
OBJECTS = {
    "template/tmpl/1/224/template.properties": "java template",
    "template/tmpl/1/224/9e8d.qcow2": "java template",
    "template/tmpl/1/224/My image (1).iso": "java template",
    "template/tmpl/1/225/template.properties": "",
    "volumes/1/5/volume.properties": "java volume",
    "volumes/1/5/x.ova": "java volume",
    "snapshots/1/5/s1": "file",
    "snapshots/1/5/s1.vhd": "file",
    "snapshots/1/5/s10": "",
    "snapshots/1/5/s2/s2.ovf": "directory",
    "snapshots/1/5/s2/s2-disk0.vmdk": "directory",
    "snapshots/1/5/s3/s3.ovf": "",
    "snapshots/1/6/s1": "volume",
    "snapshots/1/6/odd name": "volume",
    "snapshots/1/6/s4/s4.ovf": "volume",
    "snapshots/1/60/s1": "",
}
DELETIONS = {
    "java template": ("Template", "template/tmpl/1/224/9e8d.qcow2"),
    "java volume": ("Volume", "volumes/1/5/x.ova"),
    "file": ("Snapshot", "snapshots/1/5/s1"),
    "directory": ("Snapshot", "snapshots/1/5/s2/s2"),
}


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_deletions(zones: Callable[[str], Zone], s3_server: S3Server, kind: str) -> None:
    """Each deletion removes all objects of its artifact, from any writer, and nothing else."""
    zone = zones(kind)
    bucket = zone.store.get("com.cloud.agent.api.to.S3TO", {}).get("bucketName", "")
    for key in OBJECTS:
        if bucket:
            s3_server.client().put_object(Bucket=bucket, Key=key, Body=b"x")
        else:
            (zone.site.store / key).parent.mkdir(parents=True, exist_ok=True)
            (zone.site.store / key).write_bytes(b"x")

    def left() -> set[str]:
        if bucket:
            found = s3_server.client().list_objects_v2(Bucket=bucket).get("Contents", [])
            return {each["Key"] for each in found if not each["Key"].endswith("/")}
        return set(zone.site.files()) - {".ssvm-store"}

    expected = set(OBJECTS)
    for name, (type_, path) in DELETIONS.items():
        for _ in range(2):  # again: a missing object is no error
            answer = zone.agent.send("DeleteCommand", data=data_object(type_, path, zone.store))
            assert answer["result"] is True, answer
        expected -= {key for key, owner in OBJECTS.items() if owner == name}
        assert left() == expected, name
    answer = zone.agent.send("DeleteSnapshotsDirCommand", store=zone.store, directory="snapshots/1/6")
    assert answer["result"] is True, answer
    assert left() == {key for key, owner in OBJECTS.items() if not owner}


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_data_of_others(zones: Callable[[str], Zone], s3_server: S3Server, http_server: HttpServer, kind: str) -> None:
    """Neither a clean-up nor a failed download removes what the Java agent and hypervisors have written."""
    zone = zones(kind)
    bucket = zone.store.get("com.cloud.agent.api.to.S3TO", {}).get("bucketName", "")
    keys = {*OBJECTS, "template/tmpl/2/202/9e8d.qcow2", "template/tmpl/2/202/template.properties"}
    for key in keys:
        if bucket:
            s3_server.client().put_object(Bucket=bucket, Key=key, Body=b"x")
        else:
            (zone.site.store / key).parent.mkdir(parents=True, exist_ok=True)
            (zone.site.store / key).write_bytes(b"x")
    assert zone.download(http_server.url("missing"))["downloadStatus"] == "DOWNLOAD_ERROR"
    done = zone.site.wait(zone.site.submit("cleanup", older_than="0s"))
    assert done.state == "succeeded", done
    found = done.result or {}
    assert (found["found"], found["failed"]) == ([], {})
    if bucket:
        listed = s3_server.client().list_objects_v2(Bucket=bucket).get("Contents", [])
        assert {each["Key"] for each in listed if not each["Key"].endswith("/")} == keys
    else:
        assert set(zone.site.files()) - {".ssvm-store"} == keys


def test_with_a_server(make_site: Callable[..., Site], http_server: HttpServer, tmp_path: Path) -> None:
    """A simulated management server brings an agent Up, registers a template, reads it in all ways, and deletes it."""
    times = ServerTimes(ping=PATIENCE_S, poll=0.5)
    with make_management_server(tmp_path / "ca", times=times) as server:
        row = server.zone.add_store(PLACE)
        server.zone.add_system_vm("s-1-VM", "192.0.2.77")
        site = make_site(cloudstack={**section_for(server), "stores": {PLACE: "primary"}})
        site.start()
        with running_agent(site.settings):
            server.wait_up(timeout=PATIENCE_S)
            data = image()
            template = server.register_template(http_server.serve("a.qcow2", data))
            server.wait_ready(template, PATIENCE_S)
            assert (template.size, template.physical_size) == (1 << 30, len(data))
            digest = f"{{SHA-256}}{hashlib.sha256(data).hexdigest()}"
            assert template.checksum == digest
            assert server.checksum(template, "SHA-256").details == digest
            purged = "DownloadProgress request=PURGE: DownloadAnswer downloadStatus=DOWNLOADED"
            server.wait(lambda: any(purged in line for line in server.log), purged, PATIENCE_S)
            [(_, stats)] = server.collect_stats()
            assert stats.ok
            folder = f"template/tmpl/{template.account}/{template.id}"
            assert server.browse(row, folder).fields["names"] == [
                *(f"{template.id}.qcow2", "manifest.json", "template.properties"),
            ]
            assert row.parent == "211a4e01-cf68-3a99-9f57-f56c563748d4"
            assert server.delete(template).ok
            assert set(site.files()) <= {".ssvm-store"}
