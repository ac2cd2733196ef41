"""A deletion is one job for one artifact; a path that is none of CloudStack's deletes nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack import jobs_to_end
from ssvm_worker.cloudstack.commands import deletes
from ssvm_worker.errors import StoreAway
from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring.assembly import open_ledger
from tests.servers.broker import Broker

from .agents import NFS, Agent, data_object, settings_of


@pytest.fixture
def agent(broker: Broker, tmp_path: Path) -> Agent:
    return Agent(settings_of(broker, tmp_path))


def jobs(agent: Agent) -> list[Record]:
    return agent.services.jobs.jobs()


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker runs in these tests, so that each wait ends at once."""
    monkeypatch.setattr(deletes, "_DELETE_S", 0.0)


@pytest.mark.parametrize(
    ("kind", "path", "request_"),
    [
        ("Template", "template/tmpl/2/202", {"kind": "template", "id": "202"}),
        ("Template", "template/tmpl/2/202//9e8d.ova", {"kind": "template", "id": "202"}),
        ("Template", "template/tmpl/2/202/202-2-aaaa/My image (1).iso", {"kind": "template", "id": "202"}),
        ("Volume", "volumes/2/31/x.ova", {"kind": "volume", "id": "31"}),
        ("Snapshot", "snapshots/2/31/s1", {"kind": "backup", "volume": "31", "id": "s1", "files": "s1"}),
        ("Snapshot", "snapshots/2/31/s1/s1", {"kind": "backup", "volume": "31", "id": "s1"}),
        ("Snapshot", "snapshots/2/31/s1/s2", {"kind": "backup", "volume": "31", "id": "s1", "files": "s2"}),
    ],
)
def test_request(agent: Agent, kind: str, path: str, request_: dict[str, str]) -> None:
    """The job names the artifact of the path, and is cancelled if it does not end in time."""
    answer = agent.send("DeleteCommand", data=data_object(kind, path))
    (record,) = jobs(agent)
    wanted = {"kind": "template", "account": "2", "stores": ["primary"]} | request_
    shown = {"kind": "template"} | {name: value for name, value in record.request.items() if name != "job_id"}
    assert shown | {"stores": ["primary"]} == wanted
    assert (answer["class"], answer["result"]) == ("Answer", False)
    assert record.state == "cancelled", "a deletion that the server counts as failed must not run later"


@pytest.mark.parametrize(("kind", "path"), [("Snapshot", "snapshots/2/31"), ("Snapshot", None), ("Template", "")])
def test_nothing_to_delete(agent: Agent, kind: str, path: str | None) -> None:
    """An object without a path, and the directory of a volume's snapshots, are success without a deletion."""
    assert agent.send("DeleteCommand", data=data_object(kind, path))["result"] is True
    assert jobs(agent) == []


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Template", "template/tmpl/2"),
        ("Template", "template/tmpl/2/.."),
        ("Template", "template/tmpl/2/202/../203"),
        ("Template", "../../etc/passwd"),
        ("Template", "/"),
        ("Template", "volumes/2/31"),
        ("Volume", "template/tmpl/2/202"),
        ("Volume", "volumes/2/a b"),
        ("Volume", "volumes/2/31\x00"),
        ("Snapshot", "template/tmpl/2/202"),
        ("Snapshot", "snapshots/2"),
        ("Snapshot", "snapshots/2/31/_packs"),
        ("Snapshot", "snapshots/2/31/a/b/c"),
        ("Snapshot", "snapshots/2/31/*"),
    ],
)
def test_hostile_paths(agent: Agent, kind: str, path: str) -> None:
    """A path outside the layout of its kind is a failed answer, and no job."""
    answer = agent.send("DeleteCommand", data=data_object(kind, path))
    assert answer["result"] is False
    assert jobs(agent) == []


def _backup(path: str | None, screenshot: str | None = None) -> dict[str, Any]:
    fields = {"dataStoreTO": NFS, "path": path, "screenshotPath": screenshot, "id": 7}
    return {"org.apache.cloudstack.storage.to.BackupDeltaTO": fields}


def test_backup(agent: Agent, tmp_path: Path) -> None:
    """A backup of KVM loses its file, its screenshot and its empty directory, and no other file; also when repeated."""
    folder = tmp_path / "store/backups/2/9"
    folder.mkdir(parents=True)
    other = folder.parent / "a b+c.qcow2"
    for each in (folder / "d 1.qcow2", folder / "s.png", other):
        each.write_bytes(b"x")
    for _ in range(2):
        data = _backup("backups/2/9/d 1.qcow2", "/backups/2/9/s.png")
        answer = agent.send("DeleteCommand", data=data, deleteChain=True)
        assert (answer["class"], answer["result"]) == ("Answer", True)
    assert [each for each in (tmp_path / "store/backups").rglob("*") if each != other.parent] == [other]


@pytest.mark.parametrize("path", ["../x", "backups/../../x", "template/tmpl/2/202/x", "volumes/2/31/x", "a\x00b"])
def test_hostile_backups(agent: Agent, path: str) -> None:
    """A path of a backup that leaves the store, or is of another kind, deletes nothing and names the backup."""
    for data in (_backup(path), _backup("backups/x", path)):
        answer = agent.send("DeleteCommand", data=data)
        assert (answer["class"], answer["result"], answer["backupId"]) == ("BackupDeleteAnswer", False, 7)


def test_running_download(agent: Agent) -> None:
    """A deletion cancels the download of the same template, and no other."""
    for number in ("202", "203"):
        request = {"url": "http://a/b", "account": "2", "id": number, "stores": ["primary"], "job_id": number}
        agent.services.jobs.submit("download", **request)
    agent.send("DeleteCommand", data=data_object("Template", "template/tmpl/2/202"))
    states = {each.job_id: each.state for each in jobs(agent) if each.job == "download"}
    assert states == {"202": "cancelled", "203": "queued"}


def test_store_away(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion whose store is away fails within seconds, and does not run later."""
    monkeypatch.setattr(deletes, "_DELETE_S", 600.0)
    monkeypatch.setattr(jobs_to_end, "_AWAY_S", 0.0)
    job_id = agent.services.jobs.submit("delete", account="2", id="202").job_id
    with open_ledger(agent.services.settings) as ledger:
        claim = ledger.claim(job_id, "w")
        assert claim
        ledger.release(claim, StoreAway("The store is away", "x").as_dict(), 60.0, counted=False)
    with pytest.raises(StoreAway, match="The store is away"):
        jobs_to_end.wait_for_job(agent.services, job_id, 600.0)
    assert agent.services.jobs.job(job_id).cancel_requested or agent.services.jobs.job(job_id).ended


def test_repeated(agent: Agent) -> None:
    """A deletion attaches to a running one of the same artifact, and is a new job after its end."""
    job_id = jobs_to_end.job_id_of("delete", "x")
    request = {"account": "2", "id": "202"}
    first = jobs_to_end.start_job(agent.services, "delete", job_id, request)
    assert jobs_to_end.start_job(agent.services, "delete", job_id, request) == first == job_id
    agent.services.jobs.cancel(first, by="x")
    assert jobs_to_end.start_job(agent.services, "delete", job_id, request) == f"{job_id}.1"


@pytest.mark.parametrize("directory", ["snapshots/2", "snapshots/2/31/s1", "template/tmpl/2", "snapshots/2/..", ""])
def test_hostile_directories(agent: Agent, directory: str) -> None:
    """A directory that is not that of a volume's snapshots is refused."""
    assert agent.send("DeleteSnapshotsDirCommand", store=NFS, directory=directory)["result"] is False
    assert jobs(agent) == []


def test_missing_directory(agent: Agent) -> None:
    """A missing directory of snapshots is success."""
    assert agent.send("DeleteSnapshotsDirCommand", store=NFS, directory="snapshots/2/31")["result"] is True


@pytest.mark.parametrize(("algorithm", "name"), [("SHA-512", "sha512"), ("sha256", "sha256"), (None, "md5")])
def test_checksum(agent: Agent, tmp_path: Path, algorithm: str | None, name: str) -> None:
    """The digest of a file has the form of CloudStack; without an algorithm it is MD5."""
    (tmp_path / "store/a").mkdir()
    (tmp_path / "store/a/x.ova").write_bytes(b"abc")
    fields: dict[str, Any] = {"store": NFS, "templatePath": "/a//x.ova"} | (
        {"algorithm": algorithm} if algorithm else {}
    )
    answer = agent.send("ComputeChecksumCommand", **fields)
    label = {"sha512": "SHA-512", "sha256": "SHA-256", "md5": "MD5"}[name]
    assert answer["details"] == f"{{{label}}}{hashlib.new(name, b'abc').hexdigest()}"


@pytest.mark.parametrize("fields", [{"templatePath": "../x"}, {"templatePath": "a"}, {"algorithm": "ROT13"}])
def test_no_checksum(agent: Agent, fields: dict[str, str]) -> None:
    """A missing file, a path outside the store and an unknown algorithm are failed answers."""
    answer = agent.send("ComputeChecksumCommand", **({"store": NFS, "templatePath": "a/x"} | fields))
    assert answer["result"] is False
