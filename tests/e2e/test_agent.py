"""Processes of ``ssvm agent`` with a simulated management server and a real broker."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.agent import Agent
from ssvm_worker.cloudstack.command_pool import failed
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.cloudstack.guid_claim import GuidClaim
from ssvm_worker.config import load
from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from ssvm_worker.ledger.agents import AgentRegistry
from ssvm_worker.wiring import assembly
from tests.servers.agent import AgentProcess, section_for
from tests.servers.broker import Broker
from tests.waiting import CLAIM_S, PATIENCE_S, until

pytestmark = pytest.mark.e2e


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagementServer]:
    """A server of 4.23 without stores."""
    with make_management_server(tmp_path / "ca", times=ServerTimes(ping=PATIENCE_S)) as server:
        yield server


def environ_of(server: ManagementServer, broker: Broker, state: Path) -> dict[str, str]:
    """Return settings as the environment has them."""
    values: dict[str, Any] = {"broker__url": broker.url, "broker__prefix": broker.prefix, "state_dir": str(state)}
    values["ledger__claim_s"] = str(CLAIM_S)
    section = section_for(server)
    return values | {f"cloudstack__{key}": ",".join(v) if isinstance(v, list) else str(v) for key, v in section.items()}


def test_up_and_down(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """The process gets Up, logs what happens without secrets, and SIGTERM ends it with status 0."""
    agent = AgentProcess(tmp_path / "log", environ_of(server, broker, tmp_path / "state"))
    try:
        connection = server.wait_up(timeout=PATIENCE_S)
        assert connection.send("CheckHealthCommand", {}).ok
        registry = AgentRegistry(broker.url, prefix=broker.prefix)
        until(lambda: [each.connected for each in registry.agents()] == [True], "the ledger knows it")
        until(lambda: [each.command for each in registry.answers()] == ["CheckHealthCommand"], "the answer is counted")
    finally:
        status = agent.terminate()
    assert status == 0, agent.text
    assert "Up with the id 1" in agent.text
    assert server.host_row("s-1-VM").states == ["Connecting", "Up", "Disconnected"]
    assert [each.held for each in registry.agents()] == [False]


def test_take_over(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """After kill -9 of the agent, the standby agent takes over within seconds, and not before."""
    agents = [AgentProcess(tmp_path / "log0", environ_of(server, broker, tmp_path / "state0"))]
    try:
        server.wait_up(timeout=PATIENCE_S)
        agents.append(AgentProcess(tmp_path / "log1", environ_of(server, broker, tmp_path / "state1")))
        until(lambda: "this one waits" in agents[1].text, "the second one waits")
        assert server.host_row("s-1-VM").states == ["Connecting", "Up"]
        agents[0].kill()
        until(lambda: server.host_row("s-1-VM").states[-2:] == ["Connecting", "Up"], "Up again")
        until(lambda: "Up with the id 1" in agents[1].text, "the second one is Up")
        assert server.zone.problems == []
    finally:
        for each in agents:
            each.kill()


def hang(environ: dict[str, str], seconds: float) -> None:
    """Run an agent whose setup commands hang."""
    settings = load(environ={f"SSVM_{name.upper()}": value for name, value in environ.items()})
    claim = GuidClaim(assembly.open_agents(settings), "s-1-VM", settings.zone, settings.ledger.claim_s)
    claim.start()

    def handler(message: RawMessage) -> RawMessage:
        time.sleep(seconds)
        return failed(message.short)

    Agent(settings, handler, claim=claim).run()


def test_killed_during_setup(broker: Broker, tmp_path: Path) -> None:
    """An agent that is killed during the setup leaves no blocked host: the next one answers its command."""
    times = ServerTimes(ping=PATIENCE_S, wait=100 * PATIENCE_S)
    with make_management_server(tmp_path / "ca", times=times) as server:
        server.zone.add_store("nfs://192.0.2.10/export/sec1", readonly=True)
        server.zone.add_system_vm("s-1-VM", "192.0.2.77")
        arguments = (environ_of(server, broker, tmp_path / "state"), PATIENCE_S)
        first = multiprocessing.get_context("spawn").Process(target=hang, args=arguments, daemon=True)
        first.start()
        until(lambda: any("→ SecStorageSetup" in line for line in server.log), "the setup")
        registry = AgentRegistry(broker.url, prefix=broker.prefix)
        until(lambda: any(each.info.unanswered for each in registry.agents()), "the ledger knows the command")
        first.kill()
        second = AgentProcess(tmp_path / "log", environ_of(server, broker, tmp_path / "state"))
        try:
            server.wait_up(timeout=PATIENCE_S)
        finally:
            second.kill()
        assert "answering a setup command of the lost connection" in second.text
        assert server.zone.problems == []


def broker_of(broker: Broker, state: Path) -> dict[str, str]:
    """Return the settings that no file of CloudStack has."""
    return {"broker__url": broker.url, "broker__prefix": broker.prefix, "state_dir": str(state)}


def test_from_cmdline(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """The command line of a system VM and a fingerprint are enough to get Up."""
    file = tmp_path / "cmdline"
    file.write_text(
        f"template=domP type=secstorage host={server.host}@static port={server.port} name=s-7-VM zone=1 pod=1"
    )
    environ = broker_of(broker, tmp_path / "state")
    environ["cloudstack__fingerprint"] = f"sha256:{server.authority.fingerprint}"
    agent = AgentProcess(tmp_path / "log", environ, "--from-cmdline", str(file))
    try:
        server.wait_up("s-7-VM", PATIENCE_S)
    finally:
        agent.terminate()
    assert server.host_row("s-7-VM").guid == "s-7-VM-NfsSecondaryStorageResource"


def test_properties(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """The Java agent's file and the certificates next to it are enough to get Up at a strict server."""
    server.strict = True
    issued = server.authority.issue("127.0.0.1")
    file = issued.certificate.parent / "agent.properties"
    file.write_text(f"#comment\nguid=s-8-VM\nhost={server.host}\nport={server.port}\nzone=1\n")
    agent = AgentProcess(tmp_path / "log", broker_of(broker, tmp_path / "state"), "--properties", str(file))
    try:
        server.wait_up("s-8-VM", PATIENCE_S)
    finally:
        agent.terminate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "names no management server"),
        (("--from-cmdline", "/nowhere"), "/nowhere"),
        (("--properties", "/nowhere"), "/nowhere"),
    ],
)
def test_wrong_settings(arguments: tuple[str, ...], message: str) -> None:
    """Missing settings end the command with status 2 and say what to do."""
    command = [sys.executable, "-m", "ssvm_worker", "agent", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert message in json.loads(done.stdout)["message"]
