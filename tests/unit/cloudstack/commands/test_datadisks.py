"""The disks of an OVA are listed as the Java agent lists them, and hostile descriptors are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.commands import datadisks
from ssvm_worker.formats.ova import MAX_TEXT
from tests.archives import ovf_with_hardware
from tests.servers.broker import Broker
from tests.unit.cloudstack.recorded import conversations

from .agents import NFS, Agent, data_object, settings_of

OVF = ovf_with_hardware("t-disk1.vmdk", "t-disk2.vmdk", others=("tools.iso",))
DIRECTORY = "template/tmpl/1/224"


@pytest.fixture
def agent(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent without a worker, so that each wait ends at once."""
    monkeypatch.setattr(datadisks, "limit_of", lambda _: 0.0)
    return Agent(settings_of(broker, tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The directory of an OVA as the Java agent leaves it."""
    folder = tmp_path / "store" / DIRECTORY
    folder.mkdir(parents=True)
    files = {"t.ovf": OVF, "t-disk1.vmdk": b"1" * 65536, "t-disk2.vmdk": b"2" * 100, "tools.iso": b"i", "x.ova": b"p"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def ask(agent: Agent, path: str | None = DIRECTORY, **fields: Any) -> dict[str, Any]:
    return agent.send("GetDatadisksCommand", data=data_object("Template", path), **fields)


def recorded(name: str) -> list[dict[str, Any]]:
    """Return the contents of this message in the conversations of the Java agent, in their order."""
    return [
        message.content
        for conversation, frames in sorted(conversations().items())
        if conversation.startswith("real-ssvm")
        for frame in frames
        for message in frame.frame().messages
        if message.short == name
    ]


def test_recorded(agent: Agent, folder: Path) -> None:
    """The answer to each recorded command is that of the Java agent, apart from the directory of the path."""
    (folder / "t.ovf").write_bytes(ovf_with_hardware("t-disk1.vmdk").replace(b"vmdisk0", b"vmdisk1"))
    pairs = list(zip(recorded("GetDatadisksCommand"), recorded("GetDatadisksAnswer"), strict=True))
    assert len(pairs) == 4
    for command, expected in pairs[:2]:
        answer = agent.send("GetDatadisksCommand", **command)
        assert answer.pop("class") == "GetDatadisksAnswer"
        (disk,), (java_disk,) = answer.pop("dataDiskDetails"), expected.pop("dataDiskDetails")
        assert java_disk.pop("path").endswith(f"/{disk.pop('path')}")
        assert (disk, answer) == (java_disk, expected)


def test_disks(agent: Agent, folder: Path) -> None:
    """Every disk is listed with its stored size, and ISO images follow the disks."""
    disks = ask(agent)["dataDiskDetails"]
    assert [
        (each["path"], each["fileSize"], each["virtualSize"], each["isIso"], each["bootable"]) for each in disks
    ] == [
        (f"{DIRECTORY}/t-disk1.vmdk", 65536, 1 << 30, False, True),
        (f"{DIRECTORY}/t-disk2.vmdk", 100, 1 << 30, False, False),
        (f"{DIRECTORY}/tools.iso", 1, 1, True, False),
    ]
    by_file = ask(agent, f"{DIRECTORY}/x.ova")["dataDiskDetails"]
    assert by_file == disks


HOSTILE = {
    "a path": OVF.replace(b"t-disk1.vmdk", b"../225/t-disk1.vmdk"),
    "an absolute path": OVF.replace(b"t-disk1.vmdk", b"/etc/passwd"),
    "an encoded path": OVF.replace(b"t-disk1.vmdk", b"%2e%2e%2f225%2ft-disk1.vmdk"),
    "an entity": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + OVF[39:],
    "a bomb": b'<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>' + OVF[39:],
    "an inclusion": OVF.replace(b"<DiskSection>", b'<x xmlns="http://www.w3.org/2001/XInclude"/><DiskSection>'),
    "a huge text": OVF + b" " * MAX_TEXT,
    "deep elements": OVF.replace(b"<DiskSection>", b"<a>" * 1000 + b"</a>" * 1000 + b"<DiskSection>"),
    "no XML": b"\0" * 1000,
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_ovf(agent: Agent, folder: Path, data: bytes) -> None:
    """A hostile OVF is a failure with a reason, and no file outside is named."""
    (folder / "t.ovf").write_bytes(data)
    answer = ask(agent)
    assert (answer["class"], answer["result"]) == ("GetDatadisksAnswer", False)
    assert "dataDiskDetails" not in answer
    assert "bug" not in answer["details"]


def test_missing_file(agent: Agent, folder: Path) -> None:
    """A file that the OVF names and the store lacks is a failure that names the file."""
    (folder / "t-disk2.vmdk").unlink()
    answer = ask(agent)
    assert (answer["result"], "t-disk2.vmdk" in answer["details"]) == (False, True)
    (folder / "t-disk2.vmdk").symlink_to("/etc/passwd")
    assert ask(agent)["result"] is False
    (folder / "t.ovf").unlink()
    assert "no OVF" in ask(agent)["details"]


@pytest.mark.parametrize(
    "path", [None, "template/tmpl/1", "volumes/1/224", "../template/tmpl/1/224", f"{DIRECTORY}/a/b"]
)
def test_hostile_path(agent: Agent, folder: Path, path: str | None) -> None:
    """A path that is none of a template is refused by both commands, without a job."""
    assert ask(agent, path)["result"] is False
    data = data_object("Template", DIRECTORY)
    answer = agent.send("CreateDatadiskTemplateCommand", dataDiskTemplate=data, path=path or "", bootable=True)
    assert (answer["class"], answer["result"]) == ("CreateDatadiskTemplateAnswer", False)
    assert agent.services.jobs.jobs() == []


@pytest.mark.parametrize(
    ("number", "account", "bootable"),
    [(225, 1, True), (224, 1, False), (225, 2, False)],
    ids=["boot disk elsewhere", "data disk in place", "another account"],
)
def test_inconsistent(agent: Agent, folder: Path, number: int, account: int, bootable: bool) -> None:
    """A disk stays with its account, and only the boot disk stays in its template."""
    template = {"id": number, "accountId": account, "imageDataStore": NFS, "path": DIRECTORY}
    answer = agent.send(
        "CreateDatadiskTemplateCommand",
        dataDiskTemplate={"org.apache.cloudstack.storage.to.TemplateObjectTO": template},
        path=f"{DIRECTORY}/t-disk2.vmdk",
        bootable=bootable,
    )
    assert answer["result"] is False
    assert agent.services.jobs.jobs() == []


def test_request(agent: Agent, folder: Path) -> None:
    """The job has the names of the command, from the path of either agent."""
    for command in recorded("CreateDatadiskTemplateCommand")[:1]:
        agent.send("CreateDatadiskTemplateCommand", **command)
    (record,) = agent.services.jobs.jobs()
    wanted = {"account": "1", "id": "224", "template": "224", "disk": "t-disk1.vmdk"}
    name = "224-1-289c42c5-965d-3ff9-9aa7-281b2ba492d3"
    assert record.job == "split"
    assert {each: record.request[each] for each in (*wanted, "unique_name")} == wanted | {"unique_name": name}
