"""The setup of a store is answered within seconds, and its answer is that of the Java agent."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ssvm_worker.cloudstack.commands import setup
from tests.servers.broker import Broker

from .agents import NFS, PLACE, Agent, settings_of


def test_setup(broker: Broker, tmp_path: Path) -> None:
    """The answer names the directory as the Java agent's recorded answer does, and the key of uploads is kept."""
    agent = Agent(settings_of(broker, tmp_path))
    answer = agent.send("SecStorageSetupCommand", store=NFS, secUrl=PLACE, certs={}, postUploadKey="psk")
    assert answer == {
        "class": "SecStorageSetupAnswer",
        "_dir": "211a4e01-cf68-3a99-9f57-f56c563748d4",
        "result": True,
        "details": "success",
        "contextMap": {},
        "wait": 0,
        "bypassHostMaintenance": False,
    }
    assert agent.services.web.upload_key() == "psk"


def test_missing_directory(broker: Broker, tmp_path: Path) -> None:
    """A store that cannot be mounted is a failed answer with the reason."""
    agent = Agent(settings_of(broker, tmp_path))
    (tmp_path / "store").rmdir()
    answer = agent.send("SecStorageSetupCommand", store=NFS)
    assert (answer["class"], answer["result"]) == ("Answer", False)
    assert "does not exist" in answer["details"]


def test_hung_export(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that hangs is a failed answer after the limit; other stores are answered meanwhile."""
    agent = Agent(settings_of(broker, tmp_path))
    monkeypatch.setattr(setup, "_MOUNT_S", 0.05)
    store = agent.services.stores.find(None or _nfs())
    hangs = store.open()
    monkeypatch.setattr(hangs, "usage", lambda: time.sleep(60), raising=False)
    answer = agent.send("SecStorageSetupCommand", store=NFS)
    assert answer["result"] is False
    assert "did not answer" in answer["details"]


def _nfs() -> object:
    from ssvm_worker.cloudstack.transfer_objects import NfsTO

    return NfsTO(url=PLACE)


@pytest.mark.parametrize("url", ["nfs://", "http://192.0.2.10/x", "nfs://h/..%2f"])
def test_bad_urls(broker: Broker, tmp_path: Path, url: str) -> None:
    """A URL that is no NFS export is a failed answer."""
    agent = Agent(settings_of(broker, tmp_path))
    store = {"com.cloud.agent.api.to.NfsTO": {"_url": url, "_role": "Image"}}
    assert agent.send("SecStorageSetupCommand", store=store)["result"] is False


def test_swift(broker: Broker, tmp_path: Path) -> None:
    """Swift is refused with the reason."""
    answer = Agent(settings_of(broker, tmp_path)).send(
        "SecStorageSetupCommand", store={"com.cloud.agent.api.to.SwiftTO": {"url": "http://s"}}
    )
    assert answer["result"] is False
    assert "Swift" in answer["details"]


def test_stats(broker: Broker, tmp_path: Path) -> None:
    """The space of a directory is that of its file system; a bucket has the Java agent's constant."""
    agent = Agent(settings_of(broker, tmp_path))
    answer = agent.send("GetStorageStatsCommand", store=NFS)
    assert answer["class"] == "GetStorageStatsAnswer"
    assert answer["capacityBytes"] >= answer["usedBytes"] > 0
    s3 = {
        "com.cloud.agent.api.to.S3TO": {
            "bucketName": "cs1",
            "endPoint": "192.0.2.1",
            "accessKey": "a",
            "secretKey": "b",
        }
    }
    answer = agent.send("GetStorageStatsCommand", store=s3)
    assert (answer["result"], answer["capacityBytes"], answer["usedBytes"]) == (True, 2147483647, 0)
