"""A copy command becomes the right job, and what this agent does not do is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.commands import copies
from ssvm_worker.cloudstack.jobs_to_end import limit_of
from ssvm_worker.cloudstack.messages import decode
from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring.server_names import with_server_names
from tests.servers.broker import Broker
from tests.unit.cloudstack.recorded import vectors

from .agents import NFS, PLACE, Agent, data_object, java_template, java_volume, settings_of

SECOND = "nfs://192.0.2.11/export/sec2"
IMAGE = {"com.cloud.agent.api.to.NfsTO": {"_url": SECOND, "_role": "Image"}}
PRIMARY = {"org.apache.cloudstack.storage.to.PrimaryDataStoreTO": {"poolType": "VMFS", "host": "ds1"}}
SWIFT = {"com.cloud.agent.api.to.SwiftTO": {"url": "https://swift.example.test", "account": "a"}}


@pytest.fixture
def agent(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent without a worker, so that each wait ends at once."""
    monkeypatch.setattr(copies, "limit_of", lambda _: 0.0)
    (tmp_path / "second").mkdir()
    stores = {name: {"url": f"file://{tmp_path / path}"} for name, path in (("primary", "store"), ("second", "second"))}
    cloudstack = {"stores": {PLACE: "primary", SECOND: "second"}, "allow_stores": ["nfs://10.0.0.*/*"]}
    return Agent(settings_of(broker, tmp_path, stores=stores, cloudstack=cloudstack))


def jobs(agent: Agent) -> list[Record]:
    return agent.services.jobs.jobs()


def copy(agent: Agent, source: dict[str, Any], target: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return agent.send("CopyCommand", srcTO=source, destTO=target, **fields)


def refused(agent: Agent, source: dict[str, Any], target: dict[str, Any], **fields: Any) -> str:
    """Return the reason. No job exists."""
    answer = copy(agent, source, target, **fields)
    assert (answer["class"], answer["result"]) == ("CopyCmdAnswer", False)
    assert jobs(agent) == []
    return str(answer["details"])


def test_content_is_the_job(agent: Agent, tmp_path: Path) -> None:
    """The id of a job depends on the stores and paths only, and on no sequence or context."""
    java_template(tmp_path / "store", 2, 7, "7-2-aaaa")
    source, target = (data_object("Template", "template/tmpl/2/7", each) for each in (NFS, IMAGE))
    copy(agent, source, target, contextMap={"logid": "1"}, wait=10800)
    copy(agent, source, target, contextMap={"logid": "2"}, wait=0)
    first, second = sorted(each.job_id for each in jobs(agent))
    assert second == f"{first}.1", "the first was cancelled after its time limit, so the second is another generation"
    record = jobs(agent)[0]
    given = {name: record.request.get(name) for name in ("source", "key", "store", "to")}
    path = "template/tmpl/2/7"
    assert (record.job, given) == ("transfer", {"source": "primary", "key": path, "store": "second", "to": path})


VARIANTS = [
    ("Snapshot", PRIMARY, "Snapshot", NFS, "backupSnapshot"),
    ("Snapshot", NFS, "Template", NFS, "createTemplateFromSnapshot"),
    ("Snapshot", NFS, "Volume", PRIMARY, "createVolumeFromSnapshot"),
    ("Volume", PRIMARY, "Template", NFS, "createTemplateFromVolume"),
    ("Volume", PRIMARY, "Volume", NFS, "copyVolumeFromPrimaryToSecondary"),
    ("Volume", NFS, "Volume", PRIMARY, "copyVolumeFromImageCacheToPrimary"),
    ("Template", NFS, "Template", PRIMARY, "copyTemplateToPrimaryStorage"),
    ("Template", NFS, "Volume", PRIMARY, "copyTemplateToPrimaryStorage"),
]


@pytest.mark.parametrize(("source", "from_", "target", "to", "name"), VARIANTS)
def test_vmware(agent: Agent, source: str, from_: Any, target: str, to: Any, name: str) -> None:
    """Each command for VMware is refused by its name, and the server can end its record of the command."""
    context = {"hypervisor": "VMware", "execid": "77", "checkpoint": "1", "password": "examplepw"}
    answer = copy(agent, data_object(source, "a/b/c/d", from_), data_object(target, "a/b/c/e", to), contextMap=context)
    assert (answer["class"], answer["result"]) == ("CopyCmdAnswer", False)
    assert name in answer["details"]
    assert "Another SSVM" in answer["details"]
    assert answer["contextMap"] == {"execid": "77", "checkpoint": "1"}
    assert jobs(agent) == []


@pytest.mark.parametrize(("store", "reason"), [(PRIMARY, "primary storage"), (SWIFT, "Swift"), (None, "image store")])
def test_other_stores(agent: Agent, store: Any, reason: str) -> None:
    """A copy from or to a primary storage, Swift or nowhere is refused with the reason."""
    good, bad = data_object("Volume", "volumes/2/31"), data_object("Volume", "volumes/2/31", store)
    assert reason in refused(agent, good, bad)
    assert reason in refused(agent, bad, good)


def test_store_that_is_not_allowed(agent: Agent) -> None:
    """A store that the settings do not allow is neither read nor written."""
    other = {"com.cloud.agent.api.to.NfsTO": {"_url": "nfs://192.0.2.99/export", "_role": "Image"}}
    good, bad = data_object("Volume", "volumes/2/31"), data_object("Volume", "volumes/2/31", other)
    assert "do not allow" in refused(agent, good, bad)
    assert "do not allow" in refused(agent, bad, good)


@pytest.mark.parametrize(
    "path",
    [
        None,
        "",
        "/",
        "../../etc/passwd",
        "volumes/2/../../x",
        "volumes/2/31\0",
        "volumes/2/a b",
        "/mnt/SecStorage/x/../y",
    ],
)
def test_hostile_path(agent: Agent, tmp_path: Path, path: str | None) -> None:
    """A path that could leave the store, and an empty one, copies nothing from or to there."""
    java_volume(tmp_path / "store", 2, 31, "v")
    good, bad = data_object("Volume", "volumes/2/31"), data_object("Volume", path, IMAGE)
    refused(agent, good, bad)
    refused(agent, bad, good)


@pytest.mark.parametrize(
    ("kind", "path", "to"),
    [
        ("Template", "template/tmpl/2/7", "volumes/2/7"),
        ("Template", "template/tmpl/2/7", "snapshots/2/7/8"),
        ("Volume", "volumes/2/31", "template/tmpl/2/31"),
        ("Snapshot", "snapshots/2/31/5f2b", "snapshots/2/31/5f2b/6"),
        ("Snapshot", "snapshots/2/31/5f2b", "template/tmpl/2"),
    ],
)
def test_wrong_place(agent: Agent, tmp_path: Path, kind: str, path: str, to: str) -> None:
    """A target outside the place of its kind is refused."""
    java_template(tmp_path / "store", 2, 7, "t")
    java_volume(tmp_path / "store", 2, 31, "v")
    (tmp_path / "store/snapshots/2/31").mkdir(parents=True)
    (tmp_path / "store/snapshots/2/31/5f2b").write_bytes(b"s")
    assert "place" in refused(agent, data_object(kind, path), data_object(kind, to, IMAGE)) or kind == "Snapshot"


@pytest.mark.parametrize(
    ("kind", "path"),
    [("Template", "template/tmpl/2/7"), ("Volume", "volumes/2/31/x.ova"), ("Snapshot", "snapshots/2/31/s/s")],
)
def test_missing(agent: Agent, kind: str, path: str) -> None:
    """Missing data is a failure that names it."""
    to = {"Template": "template/tmpl/2/7", "Volume": "volumes/2/31", "Snapshot": "snapshots/2/31"}[kind]
    assert "no such" in refused(agent, data_object(kind, path), data_object(kind, to, IMAGE))


@pytest.mark.parametrize("name", ["gone.qcow2", "gone.ova"])
def test_missing_image(agent: Agent, tmp_path: Path, name: str) -> None:
    """An image that is missing in its directory is a failure, unless an OVF is there instead of its package."""
    java_template(tmp_path / "store", 2, 7, "t")
    path = f"template/tmpl/2/7/{name}"
    source, target = data_object("Template", path), data_object("Template", "template/tmpl/2/7", IMAGE)
    assert "no" in refused(agent, source, target)
    (tmp_path / "store/template/tmpl/2/7/t.ovf").write_bytes(b"ovf")
    copy(agent, source, target)
    assert len(jobs(agent)) == (1 if name.endswith(".ova") else 0)


def test_ovf_snapshot_to_template(agent: Agent, tmp_path: Path) -> None:
    """A snapshot that is an OVF becomes no template without VMware."""
    (tmp_path / "store/snapshots/2/31/s").mkdir(parents=True)
    (tmp_path / "store/snapshots/2/31/s/s.ovf").write_bytes(b"ovf")
    source = data_object("Snapshot", "snapshots/2/31/s/s")
    assert "OVF" in refused(agent, source, data_object("Template", "template/tmpl/2/203", IMAGE))


def test_permission_is_for_one_job(agent: Agent, tmp_path: Path) -> None:
    """Only the download of the command may read the store of the snapshot, and no other sender's."""
    (tmp_path / "store/snapshots/2/31").mkdir(parents=True)
    (tmp_path / "store/snapshots/2/31/5f2b").write_bytes(b"s")
    copy(agent, data_object("Snapshot", "snapshots/2/31/5f2b"), data_object("Template", "template/tmpl/2/203", IMAGE))
    (record,) = jobs(agent)
    settings = agent.services.settings
    assert settings.download.allow_stores == ()
    assert with_server_names(settings, record.job, record.job_id, record.request).download.allow_stores == ("primary",)
    assert with_server_names(settings, record.job, "j1", record.request).download.allow_stores == ()


def test_volume_to_template(agent: Agent) -> None:
    """A pair of kinds that no SSVM copies is refused."""
    source, target = data_object("Volume", "volumes/2/31"), data_object("Template", "template/tmpl/2/203", IMAGE)
    assert "volume to a template" in refused(agent, source, target)


@pytest.mark.parametrize(("wait", "expected"), [(None, 3595), (0, 3595), (1800, 3595), (60, 115), (1800000, 86400)])
def test_time_limit(wait: int | None, expected: int) -> None:
    """A command is answered before the server stops to wait, which is after twice its ``wait``."""
    assert limit_of(wait) == expected


COPIES = {
    "req-copy-snapshot-nfs-to-s3": "do not allow",
    "req-copy-snapshot-to-template": "createTemplateFromSnapshot",
    "req-copy-template-cache-to-s3": "do not allow",
    "req-copy-volume-nfs-to-nfs": "no such",
}


@pytest.mark.parametrize("name", COPIES)
def test_vectors(agent: Agent, name: str) -> None:
    """Commands of CloudStack's own classes are understood up to their store."""
    (message,) = vectors()[name][0].frame().messages
    decode(message)
    answer = agent.dispatch(message)
    assert (answer.short, answer.content["result"]) == ("CopyCmdAnswer", False)
    assert COPIES[name] in answer.content["details"]
    assert "example/secret" not in str(answer.content)
    assert answer.content.keys() == vectors()["ans-copy-failed"][0].frame().messages[0].content.keys()
