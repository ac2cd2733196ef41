"""The agent with a simulated management server, over real TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from tests.servers.agent import running_agent, settings_for
from tests.waiting import PATIENCE_S, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagementServer]:
    """A server of 4.23 with one store and the row of s-1-VM."""
    with make_management_server(tmp_path / "ca", times=ServerTimes(ping=1, wait=60)) as server:
        server.zone.add_store("nfs://192.0.2.10/export/sec1")
        server.zone.add_system_vm("s-1-VM", "192.0.2.77")
        yield server


def test_up(server: ManagementServer, tmp_path: Path) -> None:
    """The agent gets Up, stays Up by its pings, answers unknown commands, and says when it stops."""
    with running_agent(settings_for(server, tmp_path)):
        connection = server.wait_up(timeout=PATIENCE_S)
        answer = connection.send("MoveVolumeCommand", {"srcPath": "a", "destPath": "b"})
        assert (answer.name, answer.ok) == ("UnsupportedAnswer", False)
        pinged = connection.last_ping
        until(lambda: connection.last_ping > pinged, "a ping")
        assert server.host_row("s-1-VM").startup["privateIpAddress"] == "127.0.0.1"
    until(lambda: server.host_row("s-1-VM").state == "Disconnected", "the shutdown")
    assert server.host_row("s-1-VM").states == ["Connecting", "Up", "Disconnected"]
    assert server.zone.problems == []
