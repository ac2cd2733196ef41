"""The simulated management server against recordings of a real one, and its traps."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.demo.cloudstack.authority import RootAuthority
from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from ssvm_worker.demo.cloudstack.wire import LinkClosed, WireFrame
from ssvm_worker.demo.cloudstack.zone import ImageStoreRow
from tests.servers.played_agent import PlayedAgent, RecordedAgent, recorded
from tests.waiting import PATIENCE_S, until

SHORT = ServerTimes(ping=60 * PATIENCE_S, wait=60, poll=0.1, upload_poll=0.1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagementServer]:
    """One of 4.23 with one store and the row of s-1-VM."""
    server = make_management_server(tmp_path / "ca", times=SHORT)
    server.zone.add_store("nfs://192.0.2.10/export/sec1")
    server.zone.add_system_vm("s-1-VM", "192.0.2.77")
    with server:
        yield server


def _play(server: ManagementServer, name: str) -> RecordedAgent:
    agent = RecordedAgent((server.host, server.port), name)
    threading.Thread(target=agent.play, daemon=True).start()
    return agent


def _shape(frame: WireFrame) -> tuple[str, int, frozenset[str]]:
    return frame.name, frame.flags, frozenset(frame.fields)


def test_setup_is_as_recorded(server: ManagementServer) -> None:
    """Up to state Up, the server sends the frames of the recording: classes, order, flags and fields."""
    server.peers = ["192.0.2.2"]
    server.zone.stores[0].readonly = True  # as in the recording
    agent = _play(server, "real-ssvm-1-connect-download-ok-badsum-notova-404-extract-shutdown.jsonl")
    server.wait_up(timeout=PATIENCE_S)
    until(lambda: len(agent.heard) >= 6, "the second ReadyCommand")
    theirs = [frame for side, frame in agent.conversation if side == "server"][:6]
    assert [_shape(each) for each in agent.heard[:6]] == [_shape(each) for each in theirs]
    assert server.zone.stores[0].parent == "211a4e01-cf68-3a99-9f57-f56c563748d4"
    assert server.zone.problems == []


def test_lists_are_as_recorded(server: ManagementServer) -> None:
    """With lists, the kinds of commands come in the recorded order: volumes, templates, ready."""
    _play(server, "nfs-06-qcow2-extract-expiry-delete-url.jsonl")
    server.wait_up(timeout=PATIENCE_S)
    order = [line.split("→ ")[1].split(" ")[0] for line in server.log if "server → " in line]
    theirs = recorded("nfs-06-qcow2-extract-expiry-delete-url.jsonl")
    names = [frame.name.removesuffix("Command") for side, frame in theirs if side == "server" and frame.is_request]
    kept = {"SecStorageSetup", "SecStorageFirewallCfg", "SecStorageVMSetup", "ListVolume", "ListTemplate", "Ready"}
    assert list(dict.fromkeys(order)) == [each for each in dict.fromkeys(names) if each in kept]


def test_download_is_as_recorded(server: ManagementServer) -> None:
    """An OVA becomes ready through the recorded commands, and each has the recorded fields."""
    server.zone.stores[0].readonly = True
    agent = _play(server, "real-ssvm-1-connect-download-ok-badsum-notova-404-extract-shutdown.jsonl")
    server.wait_up(timeout=PATIENCE_S)
    server.zone._ids = iter([224, 225])
    checksum = "{SHA-256}ef776882b36d1f86435e9482610dd18cb72ef04bc819f86b64e18d0cebd128c7"
    given: dict[str, Any] = {"hypervisor": "VMware", "description": "real good", "checksum": checksum}
    template = server.register_template("http://192.0.2.2:18777/b.ova", "OVA", **given)
    server.wait_ready(template, PATIENCE_S)
    until(lambda: template.physical_size == 71680, "the answer to PURGE")
    ours = [each for each in agent.heard if each.is_request][5:]
    theirs = [frame for side, frame in agent.conversation if side == "server" and frame.is_request]
    about = {"DownloadCommand", "GetDatadisksCommand", "CreateDatadiskTemplateCommand", "DownloadProgressCommand"}
    first = {frame.name: frame for frame in reversed(theirs) if frame.name in about}
    assert [each.name for each in ours] == list(dict.fromkeys(each.name for each in theirs if each.name in about))
    for frame in ours:
        assert _shape(frame) == _shape(first[frame.name])
    assert (template.size, template.reports) == (1073741824, ["DOWNLOADED"])
    failed = server.register_template("http://192.0.2.2:18777/b.ova", "OVA", **given | {"checksum": "{SHA-256}00"})
    until(lambda: failed.state == "DOWNLOAD_ERROR", "the recorded error")
    assert failed.error.startswith("Failed post download script: checksum")


def test_wrong_zone(server: ManagementServer) -> None:
    """An agent of an unknown zone gets the recorded refusal, and the connection ends."""
    agent = PlayedAgent((server.host, server.port))
    agent.start_up(dataCenter="9")
    agent.receive()
    refusal = agent.receive()
    (theirs,) = [frame for _, frame in recorded("conn-wrongzone.jsonl") if frame.name == "ReadyCommand"]
    assert (_shape(refusal), refusal.sequence, refusal.agent_id) == (_shape(theirs), -1, -1)
    assert "incorrect data center: 9" in refusal.fields["_details"]
    with pytest.raises((LinkClosed, OSError)):
        agent.receive()


def test_join_lock(tmp_path: Path) -> None:
    """A connection that ends during setup blocks the host for twice the wait, and then the next one gets Up."""
    times = ServerTimes(ping=60 * PATIENCE_S, wait=1)
    with make_management_server(tmp_path / "ca", times=times) as server:
        server.zone.add_store("nfs://192.0.2.10/export/sec1")
        server.zone.add_system_vm("s-1-VM", "192.0.2.77")
        first = PlayedAgent((server.host, server.port))
        first.start_up()
        until(lambda: any("→ SecStorageSetup" in line for line in server.log), "the setup")
        started = time.monotonic()
        first.close()
        second = PlayedAgent((server.host, server.port))
        second.start_up()
        assert second.receive().name == "StartupAnswer"
        with pytest.raises((LinkClosed, OSError)):
            second.receive()
        assert time.monotonic() - started >= 2 * times.wait - 0.2
        _play(server, "nfs-06-qcow2-extract-expiry-delete-url.jsonl")
        server.wait_up(timeout=PATIENCE_S)


def test_silent_agent(tmp_path: Path) -> None:
    """An agent that sends no ping becomes Disconnected, and the server closes the connection."""
    times = ServerTimes(ping=0.4, ping_timeout=2)
    with make_management_server(tmp_path / "ca", times=times) as server:
        agent = PlayedAgent((server.host, server.port))
        agent.start_up()
        agent.receive()
        for _ in range(2):
            agent.answer(agent.receive(), "com.cloud.agent.api.ReadyAnswer", {"result": True})
        with pytest.raises((LinkClosed, OSError)):
            agent.receive()
        assert server.host_row("s-1-VM").states == ["Connecting", "Up", "Disconnected"]


def _ready(server: ManagementServer) -> tuple[PlayedAgent, Any]:
    """An agent without a row of a system VM, Up."""
    server.zone.stores.clear()
    server.zone.system_vms.clear()
    agent = PlayedAgent((server.host, server.port))
    agent.start_up()
    agent.receive()
    for _ in range(2):
        agent.answer(agent.receive(), "com.cloud.agent.api.ReadyAnswer", {"result": True})
    return agent, server.wait_up(timeout=PATIENCE_S)


def test_send_startup(server: ManagementServer) -> None:
    """A PingAnswer can ask for a second Startup, and the host gets Up again on the same connection."""
    agent, _ = _ready(server)
    server.wants_startup = True
    agent.ping(1)
    assert agent.receive().fields["sendStartup"] is True
    agent.start_up(id=1)
    assert agent.receive().name == "StartupAnswer"
    assert agent.receive().name == "ReadyCommand"
    assert server.host_row("s-1-VM").states[-1] == "Connecting"


def test_lost_answers(server: ManagementServer) -> None:
    """The server loses an answer with a wrong agentId or of an unknown class, and says so."""
    agent, connection = _ready(server)
    results: list[Any] = []
    ask = threading.Thread(target=lambda: results.append(connection.send("CheckHealthCommand", {}, wait=0.2)))
    ask.start()
    request = agent.receive()
    agent.answer(request, "com.cloud.agent.api.CheckHealthAnswer", {"result": True}, agent_id=7)
    agent.answer(request, "com.cloud.agent.api.NoSuchAnswer", {"result": True})
    ask.join()
    assert results[0].name == ""
    assert "Timed out" in results[0].details
    assert len(server.zone.problems) == 2


def test_queue_stands_still(server: ManagementServer) -> None:
    """The next command in sequence waits while the answer to the one before lacks its flag."""
    agent, connection = _ready(server)
    fields = {"store": ImageStoreRow("nfs://192.0.2.10/x").transfer_object()}
    for _ in range(2):
        threading.Thread(target=lambda: connection.send("ListTemplateCommand", fields, wait=0.5), daemon=True).start()
    request = agent.receive()
    started = time.monotonic()
    agent.answer(request, "com.cloud.agent.api.Answer", {"result": False}, flags=0x02)
    assert agent.receive().name == "ListTemplateCommand"
    assert time.monotonic() - started > 0.5
    assert "no IN_SEQUENCE flag" in server.zone.problems[0]


def test_older_release(tmp_path: Path) -> None:
    """A server of 4.18 sends no field of a later release, and has no command to move agents."""
    server = make_management_server(tmp_path / "ca", times=SHORT, release="4.18")
    with server:
        agent, connection = _ready(server)
        agent.ping(1)
        assert "sendStartup" not in agent.receive().fields
        with pytest.raises(LookupError, match="MigrateAgentConnectionCommand"):
            connection.send("MigrateAgentConnectionCommand", {})


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("none", "Empty client certificate chain"),
        ("other address", "ownership verification failed"),
        ("expired", "CERTIFICATE_VERIFY_FAILED"),
        ("other authority", "CERTIFICATE_VERIFY_FAILED"),
        ("revoked", "revoked"),
    ],
)
def test_strict(server: ManagementServer, tmp_path: Path, which: str, says: str) -> None:
    """A strict server refuses a client without a valid certificate for its address during the handshake."""
    server.strict, server.allow_expired = True, False
    address = "192.0.2.9" if which == "other address" else "127.0.0.1"
    (tmp_path / "other").mkdir()
    authority = RootAuthority(tmp_path / "other") if which == "other authority" else server.authority
    issued = authority.issue(address, days=-1 if which == "expired" else 30)
    server.revoked = {issued.serial} if which == "revoked" else set()
    with pytest.raises((ssl.SSLError, OSError, LinkClosed)):
        PlayedAgent((server.host, server.port), None if which == "none" else issued).receive()
    until(lambda: any(says in line for line in server.log), says)


def test_strict_accepts(server: ManagementServer) -> None:
    """A strict server accepts the certificate that it has issued for the address, even expired, by default."""
    server.strict = True
    agent = PlayedAgent((server.host, server.port), server.authority.issue("127.0.0.1", days=-1))
    agent.start_up()
    assert agent.receive().name == "StartupAnswer"
