"""The dispatcher answers every message."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.commands import HANDLERS, Dispatcher, copies
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.cloudstack.messages import MESSAGES, Answer
from ssvm_worker.cloudstack.services import Services, open_services
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import StoreUnavailable
from tests.neighbours import ROOT

HEALTH = "com.cloud.agent.api.CheckHealthCommand"


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return open_services(Settings(state_dir=tmp_path))


def _refuse(_: Any, __: Services) -> Answer:
    raise StoreUnavailable("The store is away", "cs-1", "Check it")


def _fail(_: Any, __: Services) -> Answer:
    raise KeyError("hunter2")


def test_every_handler_has_a_message() -> None:
    """Each handler is for a command that ``messages`` knows."""
    names = {name.rpartition(".")[2] for name in MESSAGES}
    assert set(HANDLERS) <= names


#: The commands that the Java agent 4.22 and 4.23 answers (NfsSecondaryStorageResource.executeRequest), without those
#: that the session answers.
JAVA_COMMANDS = """
DownloadProgress Download Upload CreateEntityDownloadURL DeleteEntityDownloadURL GetStorageStats CheckHealth
SecStorageFirewallCfg SecStorageVMSetup SecStorageSetup ComputeChecksum ListTemplate ListVolume DeleteSnapshotsDir Copy
Delete UploadStatus HandleConfigDriveIso GetDatadisks CreateDatadiskTemplate MoveVolume ListDataStoreObjects
QuerySnapshotZoneCopy
"""


def test_all_commands() -> None:
    """Every command of the Java agent has a handler, and there is no other."""
    assert set(HANDLERS) == {f"{name}Command" for name in JAVA_COMMANDS.split()}


def test_page() -> None:
    """The page of the commands names every command, and every copy for VMware that is refused."""
    page = (ROOT / "docs/reference/cloudstack-commands.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert {name.removesuffix("Command") for name in HANDLERS} <= named
    assert all(f"| {name} |" in page for name in copies.VMWARE.values())


def test_ftp_upload(services: Services) -> None:
    """An upload to an FTP server fails at once, in the form that ends the server's wait."""
    command = RawMessage("com.cloud.agent.api.storage.UploadCommand", {"url": "ftp://user:pw@192.0.2.1/a"})
    answer = Dispatcher(services)(command)
    assert answer.name == "com.cloud.agent.api.storage.UploadAnswer"
    assert (answer.content["uploadStatus"], answer.content["result"]) == ("UPLOAD_ERROR", False)
    assert "HTTP_DOWNLOAD" in answer.content["errorString"]


def test_check_health(services: Services) -> None:
    """The answer has the class, the text and the common fields of the Java agent's."""
    answer = Dispatcher(services)(RawMessage(HEALTH))
    assert answer.name == "com.cloud.agent.api.CheckHealthAnswer"
    common = {"contextMap": {}, "wait": 0, "bypassHostMaintenance": False}
    assert answer.content == {"result": True, "details": "resource is alive"} | common


@pytest.mark.parametrize("name", ["com.cloud.agent.api.StartVmCommand", "CheckHealthCommand", "", HEALTH + "\n\x1b[2J"])
def test_unknown_command(services: Services, name: str) -> None:
    """An unknown class gets UnsupportedAnswer."""
    answer = Dispatcher(services)(RawMessage(name))
    assert answer.name == "com.cloud.agent.api.UnsupportedAnswer"
    assert answer.content["result"] is False
    assert answer.content["details"].isprintable()


def test_worker_error(services: Services) -> None:
    """An expected error is a failed answer with the text of the error."""
    answer = Dispatcher(services, {"CheckHealthCommand": _refuse})(RawMessage(HEALTH))
    assert answer.name == "com.cloud.agent.api.Answer"
    assert (answer.content["result"], answer.content["details"]) == (False, "The store is away [cs-1]. Check it")


def test_bug(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    """A bug is a failed answer without data of the command; the log has the traceback."""
    with caplog.at_level(logging.ERROR):
        answer = Dispatcher(services, {"CheckHealthCommand": _fail})(RawMessage(HEALTH))
    assert answer.content["result"] is False
    assert "KeyError" in answer.content["details"]
    assert "hunter2" not in answer.content["details"]
    assert "Traceback" in caplog.text


def test_repeated_context(services: Services) -> None:
    """The answer repeats the entries of the context with which the server ends its records, and no other."""
    context = {"execid": "77", "checkpoint": "1", "password": "hunter2"}
    answer = Dispatcher(services)(RawMessage(HEALTH, {"contextMap": context}))
    assert answer.content["contextMap"] == {"execid": "77", "checkpoint": "1"}


def test_wrong_field(services: Services) -> None:
    """A field of a wrong type is a failed answer that names the field."""
    answer = Dispatcher(services)(RawMessage(HEALTH, {"wait": "soon"}))
    assert answer.content["result"] is False
    assert "wait" in answer.content["details"]
