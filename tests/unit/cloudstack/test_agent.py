"""The agent with simulated management servers, over real TLS."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.agent import Agent
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.cloudstack.link import AgentLink
from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.releases import class_of
from ssvm_worker.demo.cloudstack.server import ServerTimes
from ssvm_worker.errors import ConfigError
from tests.servers.agent import running_agent, settings_for
from tests.servers.scripted_server import authority_in
from tests.waiting import PATIENCE_S, until

#: Neither side loses the other because the machine is slow.
TIMES = ServerTimes(ping=PATIENCE_S, wait=60)
#: The answers to setup and lists of a zone without templates.
ANSWERS = {
    "SecStorageSetupCommand": ("SecStorageSetupAnswer", {"_dir": "211a4e01-cf68-3a99-9f57-f56c563748d4"}),
    "ListTemplateCommand": ("ListTemplateAnswer", {"templateInfos": {}}),
    "ListVolumeCommand": ("ListVolumeAnswer", {"templateInfos": {}}),
}


def answer(message: RawMessage) -> RawMessage:
    """Answer a command as a worker without artifacts does."""
    name, fields = ANSWERS.get(message.short, ("Answer", {}))
    return RawMessage(class_of(name), {"result": True} | fields).completed()


def make_server(directory: Path, **options: Any) -> ManagementServer:
    """Return a server with one store and the row of s-1-VM."""
    server = make_management_server(directory, times=TIMES, **options)
    server.zone.add_store("nfs://192.0.2.10/export/sec1")
    server.zone.add_system_vm("s-1-VM", "192.0.2.77")
    return server


@pytest.fixture(params=["4.23"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ManagementServer]:
    """A server of 4.23, or of the release of the test."""
    with make_server(tmp_path / "ca", release=request.param) as server:
        yield server


def states(server: ManagementServer) -> list[str]:
    """Return all states that the host has had."""
    return server.host_row("s-1-VM").states


@pytest.mark.parametrize("server", ["4.18", "4.20", "4.23"], indirect=True)
def test_up(server: ManagementServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each release the agent gets Up, pings, and says when it stops."""
    server.times = replace(TIMES, ping=1, ping_timeout=PATIENCE_S)
    monkeypatch.setattr(AgentLink, "quiet_s", 0.0)  # a slow machine is no silence
    with running_agent(settings_for(server, tmp_path), answer):
        connection = server.wait_up(timeout=PATIENCE_S)
        pinged = connection.last_ping
        until(lambda: connection.last_ping > pinged, "a ping")
        startup = server.host_row("s-1-VM").startup
        assert startup["privateIpAddress"] == startup["publicIpAddress"] == startup["storageIpAddress"] == "127.0.0.1"
        assert (startup["privateNetmask"], startup["msHostList"]) == ("255.0.0.0", "127.0.0.1@static")
    until(lambda: states(server)[-1] == "Disconnected", "the shutdown")
    assert states(server) == ["Connecting", "Up", "Disconnected"]
    assert server.zone.stores[0].parent == "211a4e01-cf68-3a99-9f57-f56c563748d4"
    assert server.zone.problems == []


def test_without_a_system_vm(server: ManagementServer, tmp_path: Path) -> None:
    """Without a row of a system VM the agent gets Up with the addresses of the settings, and without setup."""
    server.zone.system_vms.clear()
    given = {"private": {"address": "192.0.2.66", "netmask": "255.255.0.0", "mac": "02:fc:00:00:00:01"}}
    with running_agent(settings_for(server, tmp_path, **given, public={"address": "192.0.2.77"}), answer):
        server.wait_up(timeout=PATIENCE_S)
        startup = server.host_row("s-1-VM").startup
    assert (startup["privateIpAddress"], startup["privateNetmask"]) == ("192.0.2.66", "255.255.0.0")
    assert (startup["publicIpAddress"], startup["storageIpAddress"]) == ("192.0.2.77", "192.0.2.66")
    assert not any("→ SecStorageSetup" in line for line in server.log)


def test_restart_of_the_server(server: ManagementServer, tmp_path: Path) -> None:
    """After a restart of the server the agent is Up again with the same id."""
    with running_agent(settings_for(server, tmp_path), answer):
        server.wait_up(timeout=PATIENCE_S)
        server.stop()
        time.sleep(0.3)
        server.start()
        until(lambda: states(server).count("Up") == 2, "Up again")
    assert server.host_row("s-1-VM").startup["id"] == 1
    assert len(server.zone.hosts) == 1
    assert server.zone.problems == []


def test_restart_of_the_agent(server: ManagementServer, tmp_path: Path) -> None:
    """A restarted agent keeps id and list of servers, so the server does not send the list again."""
    server.peers = ["127.0.0.1", "192.0.2.9"]
    for _ in range(2):
        with running_agent(settings_for(server, tmp_path), answer):
            server.wait_up(timeout=PATIENCE_S)
            until(lambda: sum("→ Ready" in line for line in server.log) % 2 == 0, "the second ReadyCommand")
    assert server.host_row("s-1-VM").startup["msHostList"] == "127.0.0.1,192.0.2.9@static"
    assert server.host_row("s-1-VM").startup["id"] == 1


def test_server_that_is_away(server: ManagementServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The agent waits for a server that is away, and logs the same reason once."""
    server.stop()
    with caplog.at_level(logging.WARNING), running_agent(settings_for(server, tmp_path, backoff_s=0.05), answer):
        until(lambda: "Cannot connect" in caplog.text, "the log")
        time.sleep(0.5)
        server.start()
        server.wait_up(timeout=PATIENCE_S)
    assert caplog.text.count("Cannot connect") == 1


def test_second_server(server: ManagementServer, tmp_path: Path) -> None:
    """The agent tries all servers of its list until one answers."""
    settings = settings_for(server, tmp_path, servers=["127.0.0.9", "127.0.0.8", server.host])
    with running_agent(settings, answer):
        server.wait_up(timeout=PATIENCE_S)


def test_migration(server: ManagementServer, tmp_path: Path) -> None:
    """The agent moves to another server of the same database, says so in Startup, and keeps its id."""
    other = ManagementServer(
        server.zone, server.authority, address=("127.0.0.2", server.port), times=TIMES, release="4.23"
    )
    with other, running_agent(settings_for(server, tmp_path, servers=[server.host, other.host]), answer):
        server.wait_up(timeout=PATIENCE_S)
        (moved,) = server.migrate([server.host, other.host], avoid=[server.host])
        assert moved.ok
        until(lambda: server.host_row("s-1-VM").connection is not None and _of(other), "the host is at the other")
        other.wait_up(timeout=PATIENCE_S)
        startup = server.host_row("s-1-VM").startup
        assert (startup["connectionTransferred"], startup["id"]) == (True, 1)
    assert server.zone.problems == []


def _of(server: ManagementServer) -> bool:
    connection = server.host_row("s-1-VM").connection
    return connection is not None and connection.server is server


def test_only_server_is_to_avoid(server: ManagementServer, tmp_path: Path) -> None:
    """If the only server is in maintenance, the agent still returns to it when the connection is lost."""
    with running_agent(settings_for(server, tmp_path), answer) as agent:
        connection = server.wait_up(timeout=PATIENCE_S)
        lists = {"msList": [server.host], "avoidMsList": [server.host], "lbAlgorithm": "static", "lbCheckInterval": 0}
        assert connection.send("SetupMSListCommand", lists).ok
        assert agent._context.state.avoid == {server.host}
        connection.close("the test")
        until(lambda: states(server).count("Up") == 2, "Up again")


@pytest.mark.parametrize("which", ["valid", "expired but allowed"])
def test_strict(server: ManagementServer, tmp_path: Path, which: str) -> None:
    """A strict server accepts the certificate that its authority has issued for the address of the agent."""
    server.strict = True
    issued = server.authority.issue("127.0.0.1", days=30 if which == "valid" else -1)
    files = {"ca_file": issued.ca, "certificate_file": issued.certificate, "key_file": issued.key}
    with running_agent(settings_for(server, tmp_path, **files), answer):
        server.wait_up(timeout=PATIENCE_S)


@pytest.mark.parametrize("which", ["none", "other address", "expired", "other authority", "revoked"])
def test_strict_refuses(server: ManagementServer, tmp_path: Path, which: str, caplog: pytest.LogCaptureFixture) -> None:
    """A refused certificate is a log line with a remedy, and the agent gets Up when the files are right."""
    server.strict, server.allow_expired = True, False
    address = "192.0.2.9" if which == "other address" else "127.0.0.1"
    authority = authority_in(tmp_path / "other") if which == "other authority" else server.authority
    issued = authority.issue(address, days=-1 if which == "expired" else 30)
    server.revoked = {issued.serial} if which == "revoked" else set()
    files = {"certificate_file": tmp_path / "cloud.crt", "key_file": tmp_path / "cloud.key"}
    if which != "none":
        shutil.copy(issued.certificate, files["certificate_file"])
        shutil.copy(issued.key, files["key_file"])
    with caplog.at_level(logging.WARNING), running_agent(settings_for(server, tmp_path, **files), answer):
        until(lambda: "TLS handshake" in caplog.text, "the reason")
        assert f"{'without' if which == 'none' else 'with'} a certificate of the agent failed" in caplog.text
        assert "for the address 127.0.0.1" in caplog.text
        right = server.authority.issue("127.0.0.1")
        shutil.copy(right.key, files["key_file"])
        shutil.copy(right.certificate, files["certificate_file"])
        server.wait_up(timeout=PATIENCE_S)


def test_wrong_server(server: ManagementServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server with an unexpected certificate gets no Startup."""
    other = authority_in(tmp_path / "other")
    settings = settings_for(server, tmp_path, ca_file=other.certificate_file)
    with caplog.at_level(logging.WARNING), running_agent(settings, answer):
        until(lambda: "not expected" in caplog.text, "the reason")
    assert server.zone.hosts == []


def test_files_that_come_later(server: ManagementServer, tmp_path: Path) -> None:
    """In a system VM the server writes the certificates after the start, and the agent gets Up without a restart."""
    server.strict = True
    names = {"ca_file": "cloud.ca.crt", "certificate_file": "cloud.crt", "key_file": "cloud.key"}
    files = {key: tmp_path / name for key, name in names.items()}
    with running_agent(settings_for(server, tmp_path, **files), answer):
        time.sleep(0.3)
        issued = server.authority.issue("127.0.0.1")
        shutil.copy(issued.ca, files["ca_file"])
        shutil.copy(issued.key, files["key_file"])
        shutil.copy(issued.certificate, files["certificate_file"])
        server.wait_up(timeout=PATIENCE_S)


def test_renewal(server: ManagementServer, tmp_path: Path) -> None:
    """After a renewal, the next connection uses the new certificate."""
    server.strict = True
    issued = server.authority.issue("127.0.0.1")
    files = {"ca_file": issued.ca, "certificate_file": issued.certificate, "key_file": issued.key}
    with running_agent(settings_for(server, tmp_path, **files), answer):
        connection = server.wait_up(timeout=PATIENCE_S)
        old = issued.serial
        assert server.renew_certificate("127.0.0.1").ok
        assert issued.serial != old
        server.revoked = {old}
        connection.close("the server reconnects the agent")
        until(lambda: states(server).count("Up") == 2, "Up with the new certificate")


def test_refused_zone(server: ManagementServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown zone is an error of the log with the text of the server, and the agent keeps trying."""
    with caplog.at_level(logging.WARNING), running_agent(settings_for(server, tmp_path, zone="9"), answer):
        until(lambda: caplog.text.count("incorrect data center: 9") >= 2, "two refusals")
    assert any(each.levelno == logging.ERROR for each in caplog.records)


def test_foreign_agent(server: ManagementServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If an agent without a claim uses the same GUID, such as the Java agent, the log says so."""
    with caplog.at_level(logging.WARNING), running_agent(settings_for(server, tmp_path), answer):
        server.wait_up(timeout=PATIENCE_S)
        with running_agent(settings_for(server, tmp_path / "other"), answer):
            until(lambda: "another agent uses the GUID s-1-VM" in caplog.text, "the hint")


def test_stopped_by_the_server(server: ManagementServer, tmp_path: Path) -> None:
    """ShutdownCommand ends the agent, which does not connect again."""
    agent = Agent(settings_for(server, tmp_path), answer)
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    assert server.wait_up(timeout=PATIENCE_S).send("ShutdownCommand", {"reason": "Requested by client"}).ok
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_connection_lost_during_setup(server: ManagementServer, tmp_path: Path) -> None:
    """A mount that hangs keeps neither the setup nor the host waiting: the answer comes within its time limit."""
    release = threading.Event()

    def hang(message: RawMessage) -> RawMessage:
        if message.short == "SecStorageSetupCommand":
            release.wait(PATIENCE_S)
        return answer(message)

    with running_agent(settings_for(server, tmp_path), hang) as agent:
        agent._context.pool._setup_s = 0.5
        server.wait_up(timeout=PATIENCE_S)
        assert any("setup of nfs://192.0.2.10/export/sec1 failed" in line for line in server.log)
        release.set()
    assert states(server)[:2] == ["Connecting", "Up"]


def test_a_hundred_commands(server: ManagementServer, tmp_path: Path) -> None:
    """A hundred commands that wait run at once, and another command is answered meanwhile."""
    running, release = threading.Semaphore(0), threading.Event()

    def slow(message: RawMessage) -> RawMessage:
        if message.short == "DownloadCommand":
            running.release()
            release.wait(PATIENCE_S)
        return answer(message)

    with running_agent(settings_for(server, tmp_path), slow):
        connection = server.wait_up(timeout=PATIENCE_S)
        results: list[bool] = []
        ask = [
            threading.Thread(target=lambda: results.append(connection.send("DownloadCommand", {}).ok), daemon=True)
            for _ in range(100)
        ]
        for each in ask:
            each.start()
        for _ in ask:
            assert running.acquire(timeout=PATIENCE_S)
        assert connection.send("CheckHealthCommand", {}).ok
        assert not results
        release.set()
        for each in ask:
            each.join(PATIENCE_S)
    assert results == [True] * 100
    assert server.zone.problems == []


def test_no_servers(tmp_path: Path, server: ManagementServer) -> None:
    """Without servers the error says what to set."""
    with pytest.raises(ConfigError, match="Set servers, name and ca_file"):
        Agent(settings_for(server, tmp_path, servers=[]), answer)
