"""Every recorded conversation, with our session as the agent and the recorded frames of the server."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack.certificates import CertificateFiles
from ssvm_worker.cloudstack.command_pool import CommandPool
from ssvm_worker.cloudstack.frame import HEADER, RawMessage
from ssvm_worker.cloudstack.link import AgentLink, LinkTrust
from ssvm_worker.cloudstack.server_list import AgentState, ServerList
from ssvm_worker.cloudstack.session import AgentContext, Session, SessionEnd
from ssvm_worker.demo.cloudstack.wire import WireFrame
from tests.servers.scripted_server import ScriptedServer
from tests.waiting import PATIENCE_S, until

from .recorded import RecordedFrame, conversations

CONVERSATIONS = conversations()
#: Requests of the agent that depend on time, so that ours sends none of them during a replay.
TIMED = ("PingStorageCommand", "PingCommand", "ShutdownCommand")


class RecordedHandler:
    """Answers each command as the recorded agent did. Equal commands get their answers in order."""

    def __init__(self, frames: list[RecordedFrame]) -> None:
        self._answers: dict[str, list[RawMessage]] = defaultdict(list)
        requests = {each.frame().sequence: each for each in frames if each.sender == "server" and each.flags & 1}
        for each in frames:
            if each.sender == "agent" and not each.flags & 1:
                asked = requests[each.frame().sequence].frame().messages[0]
                self._answers[self._key(asked)].append(each.frame().messages[0])

    def __call__(self, message: RawMessage) -> RawMessage:
        """Return the next recorded answer."""
        return self._answers[self._key(message)].pop(0)

    @staticmethod
    def _key(message: RawMessage) -> str:
        return json.dumps([message.name, message.content], sort_keys=True)


def start(server: ScriptedServer, frames: list[RecordedFrame], tmp_path: Path) -> tuple[Session, list[SessionEnd]]:
    """Run a session that starts as the recorded agent did. Return it, and the list that gets its end."""
    startup = frames[0].frame().messages[0]
    fields = {name: value for name, value in startup.content.items() if name not in ("id", "msHostList")}
    state = AgentState(tmp_path / "state.json", ServerList.parse(startup.content.get("msHostList", "192.0.2.2@static")))
    state.host_id = startup.content.get("id")
    pool, files = CommandPool(RecordedHandler(frames)), CertificateFiles(None, None, None)
    context = AgentContext(lambda _: RawMessage(startup.name, fields), state, pool, files)
    accepted = threading.Thread(target=server.accept)
    accepted.start()
    session = Session(AgentLink(server.host, server.port, LinkTrust()), context)
    accepted.join(PATIENCE_S)
    ends: list[SessionEnd] = []
    threading.Thread(target=lambda: ends.append(session.run()), daemon=True).start()
    return session, ends


def header_of(frame: WireFrame) -> tuple[int, ...]:
    """Return what a server compares: flags without compression, sequence, and all ids."""
    return (frame.flags & ~0x80, frame.sequence, frame.mgmt_id, frame.agent_id, frame.via)


def recorded_header(each: RecordedFrame) -> tuple[int, ...]:
    """Return the same of a recorded frame."""
    _, _, flags, sequence, _, *ids = HEADER.unpack(each.header)
    return (flags & ~0x80, sequence, *ids)


def wire(each: RecordedFrame) -> WireFrame:
    """Return the recorded frame for the scripted server."""
    flags, sequence, server, agent, via = recorded_header(each)
    messages = tuple(next(iter(one.items())) for one in json.loads(each.content))
    return WireFrame(flags, sequence, server, agent, via, messages)


@pytest.mark.parametrize("name", sorted(CONVERSATIONS))
def test_replay(scripted: ScriptedServer, tmp_path: Path, name: str) -> None:
    """Given the server's frames, the session sends what the recorded agent sent, with the same headers."""
    frames = CONVERSATIONS[name]
    session, ends = start(scripted, frames, tmp_path)
    open_answers: dict[int, WireFrame] = {}
    for each in frames:
        if each.sender == "server":
            frame = wire(each)
            scripted.send(replace(frame, sequence=0) if each.name == "StartupAnswer" else frame)
        elif each.name.startswith("Startup"):
            check_startup(scripted.receive(), each)
        elif each.name == "ShutdownCommand":
            stopping = threading.Thread(target=session.shut_down, daemon=True)
            stopping.start()
            sent = scripted.receive()
            stopping.join(PATIENCE_S)  # otherwise the end below may come first
            assert header_of(sent) == recorded_header(each)
            assert sent.fields == each.frame().messages[0].content
        elif each.name not in TIMED:
            sequence = each.frame().sequence
            while sequence not in open_answers:
                sent = scripted.receive()
                open_answers[sent.sequence] = sent
            check_answer(open_answers.pop(sequence), each)
    assert open_answers == {}
    scripted.close()
    until(lambda: bool(ends), "the session ends")
    expected = {"conn-wrongzone": "refused", "real-ssvm-1": "shutdown"}
    assert ends[0].kind == next((kind for start, kind in expected.items() if name.startswith(start)), "lost")


def check_startup(sent: WireFrame, recorded: RecordedFrame) -> None:
    """Compare with the recorded Startup; its sequence starts at 0 as in the Java agent."""
    flags, _, *ids = recorded_header(recorded)
    assert header_of(sent) == (flags, 0, *ids)
    theirs = recorded.frame().messages[0].content
    ours = sent.fields
    assert {key: ours.get(key) for key in theirs if key != "msHostList"} == {
        key: value for key, value in theirs.items() if key != "msHostList"
    }


def check_answer(sent: WireFrame, recorded: RecordedFrame) -> None:
    """Compare headers, class and content of an answer."""
    assert header_of(sent) == recorded_header(recorded)
    theirs: Any = recorded.frame().messages[0]
    assert (sent.name, sent.fields) == (theirs.short, theirs.content)
