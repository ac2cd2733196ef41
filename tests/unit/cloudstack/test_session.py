"""The session against a server that does what a real one was seen to do, and worse."""

from __future__ import annotations

import gzip
import json
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.certificates import CertificateFiles
from ssvm_worker.cloudstack.command_pool import CommandPool, failed
from ssvm_worker.cloudstack.frame import MAX_JSON, Frame, RawMessage
from ssvm_worker.cloudstack.link import AgentLink, LinkTrust
from ssvm_worker.cloudstack.server_list import AgentState, ServerList
from ssvm_worker.cloudstack.session import AgentContext, Session, SessionEnd
from ssvm_worker.demo.cloudstack.releases import class_of
from ssvm_worker.demo.cloudstack.wire import LinkClosed, WireFrame
from tests.servers.agent import QUICK
from tests.servers.scripted_server import FIRST, HOST_ID, MGMT_ID, ScriptedServer
from tests.unit.cloudstack.recorded import vectors
from tests.waiting import PATIENCE_S, until

OK = {"result": True, "contextMap": {}, "wait": 0, "bypassHostMaintenance": False}
SETUP = {"store": {"com.cloud.agent.api.to.NfsTO": {"_url": "nfs://192.0.2.10/x", "_role": "Image"}}}


class PlayedSession:
    """A session with a handler of the test, and what it needs."""

    def __init__(self, server: ScriptedServer, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.handler: Callable[[RawMessage], RawMessage] = lambda message: RawMessage(class_of("Answer"), dict(OK))
        self.state = AgentState(directory / "state.json", ServerList((server.host,)))
        self.times, self.pool_options = QUICK, dict[str, Any]()
        self.files = CertificateFiles(directory / "cloud.crt", directory / "cloud.key", directory / "cloud.ca.crt")
        self.ends: list[SessionEnd] = []
        self.why = ""
        self.noted: tuple[Any, ...] = ()
        self.unanswered: dict[int, Any] = {}

    def _note(self, headers: tuple[Any, ...]) -> None:
        self.noted = headers

    def start(self) -> None:
        """Connect and run the session in a thread."""
        startup = RawMessage(class_of("StartupSecondaryStorageCommand"), {"guid": "g", "name": "s-1-VM"})
        self.pool = CommandPool(lambda message: self.handler(message), **self.pool_options)
        context = AgentContext(
            lambda _: startup,
            self.state,
            self.pool,
            self.files,
            self.times,
            on_tick=lambda: self.why,
            on_unanswered=self._note,
            unanswered=self.unanswered,
        )

        def run() -> None:
            self.session = Session(AgentLink(self.server.host, self.server.port, LinkTrust()), context)
            started.set()
            self.ends.append(self.session.run())

        started = threading.Event()
        threading.Thread(target=run, daemon=True).start()

    def up(self, **startup_answer: Any) -> ScriptedServer:
        """Start it and make the host Up."""
        self.start()
        self.server.welcome(**startup_answer)
        return self.server

    def end(self) -> SessionEnd:
        """Wait for the end of the session."""
        until(lambda: bool(self.ends), "the session ends")
        return self.ends[0]


@pytest.fixture
def played(scripted: ScriptedServer, tmp_path: Path) -> Iterator[PlayedSession]:
    """A session that has not started."""
    session = PlayedSession(scripted, tmp_path)
    yield session
    scripted.close()
    if session.ends == [] and hasattr(session, "session"):
        session.end()


def test_startup_header(played: PlayedSession) -> None:
    """The first Startup has no id in header and fields, and later ones have the id that ReadyCommand gave."""
    startup = played.up()
    assert played.state.host_id == HOST_ID
    again = PlayedSession(played.server, played.directory)
    startup = again.server
    again.start()
    startup.accept()
    frame = startup.receive()
    assert (frame.agent_id, frame.via, frame.fields["id"], frame.flags) == (HOST_ID, HOST_ID, HOST_ID, 0x05)


def test_id_of_another_database(played: PlayedSession) -> None:
    """The id of ReadyCommand replaces a stored one, because the server may have a new row for this host."""
    played.state.learn_id(99)
    played.up()
    assert played.state.host_id == HOST_ID


def test_pings(played: PlayedSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings come at the interval of StartupAnswer, with the header and the fields of the Java agent."""
    monkeypatch.setattr(AgentLink, "quiet_s", 0.0)  # the test may be slow, which is no silence
    server = played.up(pingInterval=0.2)
    for _ in range(2):
        ping = server.receive()
        assert (ping.name, ping.flags, ping.mgmt_id, ping.agent_id, ping.via) == (
            *("PingStorageCommand", 0x03, -1, HOST_ID),
            HOST_ID,
        )
        server.answer(ping, "PingAnswer", {"_command": ping.fields, "sendStartup": False, "result": True})
    fields = {"changes": {}, "hostType": "Storage", "hostId": HOST_ID, "outOfBand": False, "commandInfos": []}
    assert ping.fields == fields | {key: value for key, value in OK.items() if key != "result"}


def test_pings_while_commands_hang(played: PlayedSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred commands that hang delay neither pings nor the answers to others nor ReadyCommand."""
    release = threading.Event()

    def handler(message: RawMessage) -> RawMessage:
        if message.short == "DownloadCommand":
            release.wait(PATIENCE_S)
        return RawMessage(class_of("Answer"), dict(OK))

    played.handler = handler
    monkeypatch.setattr(AgentLink, "quiet_s", 0.0)  # the test may be slow, which is no silence
    server = played.up(pingInterval=1)
    for _ in range(100):
        server.command("DownloadCommand", {}, ordered=False)
    wanted = {
        server.command("DeleteCommand", {}, ordered=False),
        server.command("ListTemplateCommand", {}),
        server.command("ReadyCommand", {"hostId": HOST_ID}),
    }
    names = []
    while wanted or "PingStorageCommand" not in names:
        frame = server.receive()
        names.append(frame.name)
        wanted.discard(frame.sequence)
    release.set()
    for _ in range(100):
        while server.receive().name == "PingStorageCommand":
            pass


def test_silent_server(played: PlayedSession) -> None:
    """A server that says nothing for two intervals is lost, although its connection is open."""
    played.up(pingInterval=0.2)
    end = played.end()
    assert (end.kind, end.was_up) == ("lost", True)
    assert "silent for 0.4 s" in end.why


def test_silence_before_ready(played: PlayedSession) -> None:
    """Before ReadyCommand a longer silence is normal: the server may wait for the lock of the host."""
    played.times = replace(QUICK, startup_s=1.5)
    played.start()
    server = played.server
    server.accept()
    server.answer(server.receive(), "StartupAnswer", {"pingInterval": 0.1, "result": True})
    assert "no command for 1.5 s" in played.end().why


def test_lost_setup(played: PlayedSession) -> None:
    """A setup command whose connection is lost is answered over the next one, because the server still waits."""
    release = threading.Event()
    played.handler = lambda _: (release.wait(PATIENCE_S), RawMessage(class_of("Answer"), dict(OK)))[1]
    played.start()
    server = played.server
    server.accept()
    server.answer(server.receive(), "StartupAnswer", {"pingInterval": 60, "result": True})
    lost = server.command("SecStorageSetupCommand", SETUP)
    until(lambda: [each[:2] for each in played.noted] == [(0x27, lost)], "the command is noted")
    server.link.close()
    assert played.end().kind == "lost"
    played.ends.clear()
    played.start()
    server.accept()
    assert server.receive().name == "StartupSecondaryStorageCommand"
    answer = server.receive()
    assert (answer.sequence, answer.flags, answer.mgmt_id, answer.agent_id) == (lost, 0x06, MGMT_ID, HOST_ID)
    assert answer.fields["result"] is False
    until(lambda: played.noted == (), "nothing waits any more")
    release.set()


def test_silence_while_the_server_waits(played: PlayedSession) -> None:
    """Before ReadyCommand the agent never ends a connection on which the server waits for an answer."""
    release = threading.Event()
    played.handler = lambda _: (release.wait(PATIENCE_S), RawMessage(class_of("Answer"), dict(OK)))[1]
    played.times = replace(QUICK, startup_s=0.3)
    played.start()
    server = played.server
    server.accept()
    startup = server.receive()
    sequence = server.command("ListTemplateCommand", SETUP)
    server.answer(startup, "StartupAnswer", {"pingInterval": 0.1, "result": True})
    time.sleep(1)
    assert played.ends == []
    release.set()
    frames = iter(server.receive, None)
    assert next(each for each in frames if each.sequence == sequence).name == "Answer"
    assert played.end().kind == "lost"


def test_send_startup(played: PlayedSession) -> None:
    """If a PingAnswer asks for it, Startup is sent again on the same connection, but not before ReadyCommand."""
    played.start()
    server = played.server
    server.accept()
    startup = server.receive()
    server.answer(startup, "PingAnswer", {"sendStartup": True, "result": True})
    server.answer(startup, "StartupAnswer", {"pingInterval": 60, "result": True})
    assert server.ask("ReadyCommand", {"hostId": HOST_ID}).name == "ReadyAnswer"
    server.answer(startup, "PingAnswer", {"sendStartup": True, "result": True})
    again = server.receive()
    assert (again.name, again.flags, again.fields["id"]) == ("StartupSecondaryStorageCommand", 0x05, HOST_ID)


@pytest.mark.parametrize(("ordered", "flags"), [(True, 0x06), (False, 0x02)])
def test_answer_header(played: PlayedSession, ordered: bool, flags: int) -> None:
    """An answer repeats sequence and ids, keeps IN_SEQUENCE, and never has FROM_SERVER."""
    answer = played.up().ask("DeleteCommand", {}, ordered=ordered)
    assert (answer.flags, answer.mgmt_id, answer.agent_id, answer.via) == (flags, MGMT_ID, HOST_ID, HOST_ID)
    assert answer.sequence == FIRST + 1
    assert answer.sequence > 2**53


def test_answer_of_a_forwarding_server(played: PlayedSession) -> None:
    """A command that another server has forwarded is answered to that server."""
    server = played.up()
    server.send(WireFrame(0x23, 5, MGMT_ID + 1, HOST_ID, HOST_ID, ((class_of("DeleteCommand"), {}),)))
    assert (answer := server.receive()).mgmt_id == MGMT_ID + 1
    assert answer.sequence == 5


@pytest.mark.parametrize(("stop", "results"), [(True, [True, False, False]), (False, [True, False, True])])
def test_several_commands(played: PlayedSession, stop: bool, results: list[bool]) -> None:
    """A frame with several commands gets as many answers, and with STOP_ON_ERROR a failure ends the rest."""
    played.handler = lambda message: (
        failed("no") if message.content.get("n") == 1 else RawMessage(class_of("Answer"), dict(OK))
    )
    server = played.up()
    commands = tuple((class_of("DeleteCommand"), {"n": number}) for number in range(3))
    server.send(WireFrame(0x21 | (0x02 if stop else 0), 5, MGMT_ID, HOST_ID, HOST_ID, commands))
    answer = server.receive()
    assert [fields["result"] for _, fields in answer.messages] == results
    if stop:
        assert answer.messages[2][1]["details"] == "Stopped by previous failure"


def test_hung_setup(played: PlayedSession) -> None:
    """A setup command that hangs gets a failure within seconds, because the server blocks the host until then."""
    release = threading.Event()
    played.handler = lambda _: (release.wait(PATIENCE_S), RawMessage(class_of("Answer"), dict(OK)))[1]
    played.pool_options = {"setup_s": 0.3}
    server = played.up()
    answer = server.ask("SecStorageSetupCommand", SETUP)
    assert (answer.name, answer.flags, answer.fields["result"]) == ("Answer", 0x06, False)
    release.set()
    assert server.ask("CheckHealthCommand", {}).sequence, "the late answer must not be sent as well"


def test_shut_down_during_setup(played: PlayedSession) -> None:
    """An agent that stops answers open setup commands first, because the server would block the host for an hour."""
    release = threading.Event()
    played.handler = lambda _: (release.wait(PATIENCE_S), RawMessage(class_of("Answer"), dict(OK)))[1]
    server = played.up()
    server.command("SecStorageSetupCommand", SETUP)
    until(lambda: played.pool.open_count == 1, "the command runs")
    threading.Thread(target=played.session.shut_down, daemon=True).start()
    time.sleep(0.2)
    assert played.ends == []
    release.set()
    names = [server.receive().name, server.receive().name]
    assert names == ["Answer", "ShutdownCommand"]
    assert played.end().kind == "shutdown"


def test_broken_handler(played: PlayedSession) -> None:
    """A handler that raises gets a failed answer without the text of the exception, which may have secrets."""

    def handler(_: RawMessage) -> RawMessage:
        raise ValueError("hunter2")

    played.handler = handler
    answer = played.up().ask("DeleteCommand", {})
    assert (answer.name, answer.fields["result"], "hunter2" in answer.fields["details"]) == ("Answer", False, False)


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_answer_that_cannot_be_sent(played: PlayedSession, value: Any) -> None:
    """An answer that is no JSON becomes a failed answer."""
    played.handler = lambda _: RawMessage(class_of("Answer"), OK | {"details": value})
    answer = played.up().ask("DeleteCommand", {})
    assert (answer.fields["result"], "bug" in answer.fields["details"]) == (False, True)


def test_refused(played: PlayedSession) -> None:
    """A ReadyCommand with details refuses the agent, for example in an unknown zone."""
    played.start()
    server = played.server
    server.accept()
    server.answer(server.receive(), "StartupAnswer", {"pingInterval": 60, "result": True})
    messages = ((class_of("ReadyCommand"), {"_details": "Host 192.0.2.66 sent incorrect data center: 9"}),)
    server.send(WireFrame(0x07, -1, -1, -1, -1, messages))
    end = played.end()
    assert (end.kind, end.was_up) == ("refused", False)
    assert "incorrect data center: 9" in end.why


def test_failed_startup(played: PlayedSession) -> None:
    """A StartupAnswer with result false ends the session with its text."""
    played.start()
    server = played.server
    server.accept()
    server.answer(server.receive(), "StartupAnswer", {"result": False, "details": "bad things"})
    assert (played.end().kind, played.end().why) == ("refused", "bad things")


def test_shutdown_by_the_server(played: PlayedSession) -> None:
    """ShutdownCommand is answered, and then the agent ends for good."""
    server = played.up()
    assert server.ask("ShutdownCommand", {"reason": "Requested by client"}).fields["result"] is True
    assert played.end().kind == "shutdown"


def test_maintenance(played: PlayedSession) -> None:
    """MaintainCommand is answered as the Java agent does it."""
    answer = played.up().ask("MaintainCommand", {})
    assert (answer.name, answer.fields["willMigrate"], answer.fields["result"]) == ("MaintainAnswer", True, True)


def test_server_list(played: PlayedSession) -> None:
    """A list of servers is stored, so that the next Startup repeats it and survives a restart."""
    server = played.up()
    lists = {"msList": ["192.0.2.1", "192.0.2.2"], "avoidMsList": ["192.0.2.1"], "lbAlgorithm": "shuffle"}
    answer = server.ask("SetupMSListCommand", lists | {"lbCheckInterval": 0}, ordered=False)
    assert (answer.name, answer.fields["result"]) == ("SetupMSListAnswer", True)
    again = AgentState(played.directory / "state.json", ServerList((server.host,)))
    assert str(again.servers) == "192.0.2.1,192.0.2.2@shuffle"
    assert [played.state.next_server() for _ in range(3)] == ["192.0.2.2"] * 3


def test_migration(played: PlayedSession) -> None:
    """MigrateAgentConnectionCommand is answered before the connection ends, and the next server is another one."""
    server = played.up()
    lists = {"msList": [server.host, "192.0.2.2"], "avoidMsList": [server.host], "lbAlgorithm": "static"}
    answer = server.ask("MigrateAgentConnectionCommand", lists, ordered=False)
    assert (answer.name, answer.fields["result"]) == ("MigrateAgentConnectionAnswer", True)
    assert played.end().kind == "migrate"
    assert played.state.next_server() == "192.0.2.2"


def test_migration_to_nowhere(played: PlayedSession) -> None:
    """Without another server the migration fails, and the connection stays."""
    server = played.up()
    lists = {"msList": [server.host], "avoidMsList": [server.host]}
    answer = server.ask("MigrateAgentConnectionCommand", lists, ordered=False)
    assert (answer.name, answer.fields["result"]) == ("MigrateAgentConnectionAnswer", False)
    assert server.ask("CheckHealthCommand", {}).fields["result"] is True


def test_preferred_server(played: PlayedSession, scripted: ScriptedServer) -> None:
    """With a check interval, an idle agent returns to the first server of the list when it is reachable."""
    server = played.up()
    lists = {"msList": ["localhost", server.host], "lbAlgorithm": "static", "lbCheckInterval": 3600}
    server.ask("SetupMSListCommand", lists | {"triggerHostLb": True}, ordered=False)
    end = played.end()
    assert (end.kind, "localhost is reachable again" in end.why) == ("migrate", True)
    assert played.state.next_server() == "localhost"


def test_answer_before_the_move(
    played: PlayedSession, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gets the answer to the command that makes the agent move, even if sending it takes long."""
    server, respond = played.up(), Session._respond

    def respond_late(session: Session, response: Frame) -> None:
        time.sleep(0.5)  # many ticks
        respond(session, response)

    monkeypatch.setattr(Session, "_respond", respond_late)
    lists = {"msList": ["localhost", server.host], "lbAlgorithm": "static", "lbCheckInterval": 3600}
    assert server.ask("SetupMSListCommand", lists | {"triggerHostLb": True}, ordered=False).fields["result"] is True
    assert played.end().kind == "migrate"


def test_certificate(played: PlayedSession) -> None:
    """A renewed certificate is stored with its key and the authority's, and a mismatched one changes nothing."""
    server = played.up()
    issued, other = server.authority.issue("127.0.0.1"), server.authority.issue("127.0.0.1")
    fields = {"certificate": issued.certificate.read_text(), "privateKey": issued.key.read_text()}
    fields |= {"caCertificates": issued.ca.read_text(), "handleByAgent": True}
    answer = server.ask("SetupCertificateCommand", fields, ordered=False)
    assert (answer.name, answer.fields["result"]) == ("SetupCertificateAnswer", True)
    files = played.files
    assert files.certificate.read_text() == issued.certificate.read_text()
    assert files.authorities.read_text() == issued.ca.read_text()
    assert files.key.stat().st_mode & 0o777 == 0o600
    answer = server.ask("SetupCertificateCommand", fields | {"privateKey": other.key.read_text()}, ordered=False)
    assert (answer.fields["result"], "does not match its key" in answer.fields["details"]) == (False, True)
    assert files.key.read_text() == issued.key.read_text()
    assert sorted(each.name for each in played.directory.iterdir()) == [
        *("cloud.ca.crt", "cloud.crt", "cloud.key", "state.json")
    ]


def test_key_store(played: PlayedSession) -> None:
    """SetupKeyStoreCommand makes a key and a request for it. A certificate without a key then uses that key."""
    from cryptography import x509

    server = played.up()
    answer = server.ask("SetupKeyStoreCommand", {"validityDays": 365, "handleByAgent": True}, ordered=False)
    assert (answer.name, answer.fields["result"]) == ("SetupKeystoreAnswer", True)
    request = x509.load_pem_x509_csr(answer.fields["csr"].encode())
    assert request.is_signature_valid
    assert request.subject.rfc4514_string() == "CN=s-1-VM"
    assert (played.directory / "cloud.new").stat().st_mode & 0o777 == 0o600


def test_no_place_for_a_certificate(played: PlayedSession) -> None:
    """Without certificate_file the answer says what to set."""
    played.files = CertificateFiles(None, None, None)
    answer = played.up().ask("SetupCertificateCommand", {"certificate": "x"}, ordered=False)
    assert (answer.fields["result"], "certificate_file" in answer.fields["details"]) == (False, True)


def test_lost_claim(played: PlayedSession) -> None:
    """If another agent holds the GUID, the connection ends without a ShutdownCommand, which would stop that agent."""
    server = played.up()
    played.why = "another agent holds the GUID now"
    assert played.end() == SessionEnd("lost", "another agent holds the GUID now", was_up=True)
    with pytest.raises(LinkClosed):
        server.receive()


def test_answer_after_the_end(played: PlayedSession, caplog: pytest.LogCaptureFixture) -> None:
    """An answer whose connection is gone is logged, and nothing else happens."""
    release = threading.Event()
    played.handler = lambda _: (release.wait(PATIENCE_S), RawMessage(class_of("Answer"), dict(OK)))[1]
    server = played.up()
    server.command("DeleteCommand", {}, ordered=False)
    until(lambda: played.pool.open_count == 1, "the command runs")
    server.close()
    assert played.end().kind == "lost"
    with caplog.at_level(logging.WARNING):
        release.set()
        until(lambda: "is lost with its connection" in caplog.text, "the log")


HEADER = struct.Struct(">BBHqiqqq")


def framed(content: bytes, *, flags: int = 0x23, size: int | None = None, version: int = 0) -> bytes:
    """Return a request with any content."""
    return HEADER.pack(version, 0, flags, 77, len(content) if size is None else size, MGMT_ID, 7, 7) + content


GOOD = b'[{"com.cloud.agent.api.CheckHealthCommand":{}}]'
BAD = {
    "size too small": framed(GOOD, size=5),
    "size too large": framed(GOOD, size=500),
    "size negative": framed(GOOD, size=-1),
    "size huge": framed(GOOD, size=MAX_JSON + 1),
    "gzip bomb": framed(gzip.compress(bytes(MAX_JSON + 1)), flags=0xA3, size=100),
    "gzip of another size": framed(gzip.compress(GOOD), flags=0xA3, size=4),
    "gzip damaged": framed(b"\x1f\x8b" + bytes(50), flags=0xA3, size=4),
    "not JSON": framed(b"{"),
    "no list": framed(b"{}"),
    "empty list": framed(b"[]"),
    "no object": framed(b"[1]"),
    "two classes": framed(b'[{"a":{},"b":{}}]'),
    "no fields": framed(b'[{"a":null}]'),
    "deep": framed(b"[" * 100_000 + b"]" * 100_000),
    "deep fields": framed(b'[{"a":' + b'{"a":' * 90 + b"1" + b"}" * 91 + b"]"),
    "not a number": framed(b'[{"a":{"b":NaN}}]'),
    "infinite": framed(b'[{"a":{"b":1e999}}]'),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_request(played: PlayedSession, case: str) -> None:
    """A request that cannot be read gets a failed answer with its sequence, and the connection stays open."""
    server = played.up()
    server.send_plain(BAD[case]) if len(BAD[case]) <= 16_000 else send_long(server, BAD[case])
    answer = server.receive()
    assert (answer.sequence, answer.name, answer.fields["result"]) == (77, "Answer", False)
    assert server.ask("CheckHealthCommand", {}).fields["result"] is True


def send_long(server: ScriptedServer, content: bytes) -> None:
    """Send a message of several records."""
    for start in range(0, len(content), 16_000):
        server.link._tls.write(content[start : start + 16_000])
        record = server.link._outgoing.read()
        more = 0x10000 if start + 16_000 < len(content) else 0
        server.socket.sendall((len(record) | more).to_bytes(4, "big") + record)


@pytest.mark.parametrize(
    "data", [b"x", bytes(39), framed(GOOD, version=1), framed(b"{", flags=0x20)], ids=["1", "39", "version", "answer"]
)
def test_bad_frame(played: PlayedSession, data: bytes) -> None:
    """A frame without a readable header, and an unreadable answer, are dropped, and the connection stays open."""
    server = played.up()
    server.send_plain(data)
    assert server.ask("CheckHealthCommand", {}).fields["result"] is True


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ReadyCommand", {"hostId": "x"}),
        ("ReadyCommand", {"hostId": [1]}),
        ("ReadyCommand", {"hostId": 7, "msHostList": {"a": 1}, "lbCheckInterval": "x"}),
        ("SetupMSListCommand", {"msList": 5, "lbCheckInterval": {}}),
        ("SetupCertificateCommand", {}),
        ("SetupCertificateCommand", {"certificate": 1, "privateKey": 2}),
        ("MigrateAgentConnectionCommand", {"msList": [None, 5]}),
    ],
)
def test_wrong_fields(played: PlayedSession, name: str, fields: dict[str, Any]) -> None:
    """A command of the session with wrong fields gets an answer, and the connection stays open."""
    server = played.up()
    assert server.ask(name, fields, ordered=False).fields["result"] in (True, False)
    assert server.ask("CheckHealthCommand", {}).fields["result"] is True


def test_every_recorded_command(played: PlayedSession) -> None:
    """Each recorded command of a server, in one connection, gets one answer with its sequence."""
    server = played.up()
    sequences = []
    ended = ("ReadyCommand", "ShutdownCommand", "MigrateAgentConnectionCommand")
    for number, (frame, _) in enumerate(vectors().values()):
        messages = tuple((each.name, each.content) for each in frame.frame().messages)
        if frame.flags & 0x21 == 0x21 and frame.name not in ended:
            server.send(WireFrame(frame.flags & ~0x80, number, MGMT_ID, HOST_ID, HOST_ID, messages))
            sequences.append(number)
    assert len(sequences) > 40
    assert sorted(server.receive().sequence for _ in sequences) == sequences


def test_strange_answers(played: PlayedSession) -> None:
    """Unexpected answers, and answers with wrong fields, change nothing."""
    server = played.up()
    ping = WireFrame(0x03, 9, -1, HOST_ID, HOST_ID, ((class_of("PingStorageCommand"), {}),))
    for interval in (-1, 0, "x", 1e300, None):
        server.answer(ping, "StartupAnswer", {"pingInterval": interval, "result": True})
    server.answer(ping, "PingAnswer", {"sendStartup": "yes", "avoidMsList": 5, "result": True})
    server.answer(ping, "Answer", {})
    assert server.ask("CheckHealthCommand", {}).fields["result"] is True


def test_no_secret_in_the_log(played: PlayedSession, caplog: pytest.LogCaptureFixture) -> None:
    """The log names commands, stores and URLs, but no secret of a command or an answer."""
    store = {
        "com.cloud.agent.api.to.S3TO": {"id": 2, "secretKey": "hunter2", "accessKey": "hunter2", "bucketName": "b"}
    }
    fields = {"store": store, "postUploadKey": "hunter2", "contextMap": {"password": "hunter2"}}
    fields |= {"url": "https://user:hunter2@h.example/x?sig=hunter2", "auth": {"password": "hunter2"}}
    with caplog.at_level(logging.INFO):
        server = played.up()
        server.ask("SecStorageSetupCommand", fields)
        server.ask("SetupCertificateCommand", {"certificate": "hunter2", "privateKey": "hunter2"}, ordered=False)
    assert "hunter2" not in caplog.text
    assert "SecStorageSetupCommand id=2 bucketName=b url=https://h.example/x?***" in caplog.text


def test_no_line_break_in_the_log(played: PlayedSession, caplog: pytest.LogCaptureFixture) -> None:
    """Text of a server cannot forge a line of the log."""
    with caplog.at_level(logging.INFO):
        played.up().ask("DeleteCommand", {"path": "a\nERROR forged", "id": "\x1b[2J"}, ordered=False)
    assert all(record.getMessage().isprintable() for record in caplog.records if "DeleteCommand" in record.getMessage())
    assert json.dumps("x")
