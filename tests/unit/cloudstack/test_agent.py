"""The agent with a simulated management server, over real TLS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.agent import Agent
from ssvm_worker.cloudstack.commands import Dispatcher
from ssvm_worker.cloudstack.frame import Handler
from ssvm_worker.cloudstack.services import open_services
from ssvm_worker.cloudstack.session import SessionTimes
from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from tests.waiting import PATIENCE_S, until

QUICK = SessionTimes(migrate_s=0.1, tick_s=0.05)


def settings_for(server: ManagementServer, tmp_path: Path, **values: Any) -> Settings:
    """Return settings for an agent of that server."""
    given = {"servers": [server.host], "port": server.port, "name": "s-1-VM", "pod": "1", "backoff_s": 0.1}
    given |= {"fingerprint": f"sha256:{server.authority.fingerprint}", "zone": "1"} | values
    return parse({"state_dir": str(tmp_path / "state"), "cloudstack": given}, "the test")


@contextmanager
def running(settings: Settings, handler: Handler | None = None, times: SessionTimes = QUICK) -> Iterator[Agent]:
    """Run an agent in a thread while the block runs."""
    agent = Agent(settings, handler or Dispatcher(open_services(settings)), times=times)
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagementServer]:
    """A server of 4.23 with one store and the row of s-1-VM."""
    with make_management_server(tmp_path / "ca", times=ServerTimes(ping=1, wait=60)) as server:
        server.zone.add_store("nfs://192.0.2.10/export/sec1")
        server.zone.add_system_vm("s-1-VM", "192.0.2.77")
        yield server


def test_up(server: ManagementServer, tmp_path: Path) -> None:
    """The agent gets Up, stays Up by its pings, answers unknown commands, and says when it stops."""
    with running(settings_for(server, tmp_path)):
        connection = server.wait_up(timeout=PATIENCE_S)
        answer = connection.send("MoveVolumeCommand", {"srcPath": "a", "destPath": "b"})
        assert (answer.name, answer.ok) == ("UnsupportedAnswer", False)
        pinged = connection.last_ping
        until(lambda: connection.last_ping > pinged, "a ping")
        assert server.host_row("s-1-VM").startup["privateIpAddress"] == "127.0.0.1"
    until(lambda: server.host_row("s-1-VM").state == "Disconnected", "the shutdown")
    assert server.host_row("s-1-VM").states == ["Connecting", "Up", "Disconnected"]
    assert server.zone.problems == []
