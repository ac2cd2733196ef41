"""Config drives, snapshots of zone copies and moves of volumes."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.commands import volumes
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.streaming.pipeline import read_bytes
from tests.servers.broker import Broker
from tests.servers.s3 import S3Server
from tests.unit.cloudstack.recorded import vectors

from .agents import NFS, PLACE, Agent, s3_object, settings_of

ISO = "configdrive/i-2-12-VM.iso"
SNAPSHOT = "snapshots/2/31/5f2b"


@pytest.fixture
def agent(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent without a worker, so that each wait ends at once."""
    monkeypatch.setattr(volumes, "limit_of", lambda _: 0.0)
    return Agent(settings_of(broker, tmp_path))


def vector(name: str) -> RawMessage:
    return vectors()[name][0].frame().messages[0]


def drive(agent: Agent, **fields: Any) -> dict[str, Any]:
    data = base64.b64encode(b"an ISO image with passwords").decode()
    given = {"isoData": data, "isoFile": ISO, "create": True, "destStore": NFS}
    return agent.send("HandleConfigDriveIsoCommand", **(given | fields))


def test_config_drive(agent: Agent, tmp_path: Path) -> None:
    """A config drive is written, replaced and deleted, and the answers are those of CloudStack's classes."""
    answer, file = drive(agent), tmp_path / "store" / ISO
    expected = vector("ans-configdrive-location")
    assert answer == {"class": expected.short} | expected.content
    assert file.read_bytes() == b"an ISO image with passwords"
    assert drive(agent, isoFile=f"/{ISO}", isoData="bmV3")["result"] is True
    assert file.read_bytes() == b"new"
    for _ in range(2):  # a missing drive is no error
        answer = drive(agent, create=False, isoData=None)
        assert (answer["class"], answer["result"]) == (expected.short, True)
        assert not file.exists()
    assert agent.services.jobs.jobs() == [], "the image is in no record"


def test_config_drive_on_s3(agent: Agent, s3_server: S3Server) -> None:
    """A config drive in a bucket is written and deleted too."""
    bucket = s3_object(s3_server, s3_server.make_bucket())
    assert drive(agent, destStore=bucket)["result"] is True
    assert drive(agent, destStore=bucket, create=False)["result"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"isoFile": "template/tmpl/1/2/x.iso"},
        {"isoFile": "../configdrive/x.iso"},
        {"isoFile": "configdrive/../template/x.iso"},
        {"isoFile": "configdrive/x.sh"},
        {"isoFile": ""},
        {"isoData": "no Base64!"},
        {"isoData": ""},
        {"isoData": None},
        {"destStore": None},
        {"destStore": {"com.cloud.agent.api.to.SwiftTO": {"url": "https://swift.example.test"}}},
    ],
    ids=str,
)
def test_bad_config_drive(agent: Agent, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A hostile path, a broken image and another store are refused, and nothing is written."""
    answer = drive(agent, **changes)
    assert (answer["class"], answer["result"]) == ("HandleConfigDriveIsoAnswer", False)
    assert "bug" not in answer["details"]
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def test_vectors(agent: Agent, tmp_path: Path) -> None:
    """Commands of CloudStack's own classes work, and the answers have the same fields."""
    config = vector("req-configdrive-create")
    answer = agent.dispatch(RawMessage(config.name, config.content | {"destStore": NFS}))
    assert answer.content.keys() == vector("ans-configdrive-location").content.keys()
    (tmp_path / "store/snapshots/2/31/s").mkdir(parents=True)
    (tmp_path / "store/snapshots/2/31/s/s.ova").write_bytes(b"s")
    query = vector("req-query-snapshot-zone-copy")
    content = {"snapshot": query.content["snapshot"] | {"dataStore": NFS}}
    answer = agent.dispatch(RawMessage(query.name, content))
    expected = vector("ans-query-snapshot-zone-copy")
    assert answer.content.keys() == expected.content.keys()
    assert [f"/{each}" for each in answer.content["files"]] == expected.content["files"]
    move = vector("req-move-volume")
    answer = agent.dispatch(RawMessage(move.name, move.content | {"datastoreUri": PLACE}))
    assert (answer.short, answer.content["result"]) == ("Answer", False)
    (record,) = agent.services.jobs.jobs()
    wanted = {"key": "volumes/2/31", "to": "volumes/3/31", "move": True, "source": "primary", "store": "primary"}
    assert (record.job, {name: record.request[name] for name in wanted}) == ("transfer", wanted)


def query(agent: Agent, path: str | None, store: Any = NFS) -> dict[str, Any]:
    return agent.send("QuerySnapshotZoneCopyCommand", snapshot={"path": path, "dataStore": store})


def test_query_file(agent: Agent, tmp_path: Path) -> None:
    """The snapshot of a hypervisor is one file."""
    (tmp_path / "store/snapshots/2/31").mkdir(parents=True)
    for name in ("5f2b", "6a7c"):
        (tmp_path / "store/snapshots/2/31" / name).write_bytes(b"s")
    assert query(agent, SNAPSHOT)["files"] == [SNAPSHOT]


def test_query_directory(agent: Agent, tmp_path: Path) -> None:
    """A snapshot in several files has all files of its directory, and not the worker's manifest."""
    folder = tmp_path / "store/snapshots/2/31/s"
    (folder / "deeper").mkdir(parents=True)
    for name in ("s.ovf", "s-disk0.vmdk", "manifest.json", "odd name.vmdk", "deeper/x"):
        (folder / name).write_bytes(b"s")
    files = query(agent, "snapshots/2/31/s/s")["files"]
    assert files == [f"snapshots/2/31/s/{name}" for name in ("odd name.vmdk", "s-disk0.vmdk", "s.ovf")]


@pytest.mark.parametrize("path", [None, "", "snapshots/2/31", "template/tmpl/1/2/x", "snapshots/2/31/../../../etc"])
def test_hostile_query(agent: Agent, path: str | None) -> None:
    """A path that is none of a snapshot, and a missing snapshot, are failures and no empty lists."""
    for each in (query(agent, path), query(agent, SNAPSHOT)):
        assert (each["class"], each["result"]) == ("QuerySnapshotZoneCopyAnswer", False)
        assert "files" not in each


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("volumes/2/31", "template/tmpl/3/31"),
        ("volumes/2/31", "volumes/3"),
        ("volumes/2/31", "volumes/3/../../etc"),
        ("template/tmpl/2/31", "volumes/3/31"),
        ("", "volumes/3/31"),
        ("volumes/2/31", "volumes/2/31"),
    ],
)
def test_hostile_move(agent: Agent, old: str, new: str) -> None:
    """A move from or to another place than that of a volume is refused without a job."""
    answer = agent.send("MoveVolumeCommand", srcPath=old, destPath=new, datastoreUri=PLACE)
    assert (answer["class"], answer["result"]) == ("Answer", False)
    assert agent.services.jobs.jobs() == []


def test_move_on_an_unknown_store(agent: Agent) -> None:
    """A store that is no NFS export is refused."""
    for uri in ("", "file:///etc", "s3://bucket"):
        answer = agent.send("MoveVolumeCommand", srcPath="volumes/2/31", destPath="volumes/3/31", datastoreUri=uri)
        assert answer["result"] is False
    assert agent.services.jobs.jobs() == []


def test_small_object_is_complete(agent: Agent) -> None:
    """The store holds exactly the bytes of the image."""
    drive(agent, isoData=base64.b64encode(bytes(range(256)) * 4000).decode())
    store = agent.services.stores.named("primary").open()
    assert read_bytes(store, ISO) == bytes(range(256)) * 4000
