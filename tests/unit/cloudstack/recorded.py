"""The recorded data in tests/data/cloudstack: single messages, and conversations of agents with a server.

CloudStack's own classes wrote the vectors. ``real-ssvm-*`` are conversations of the Java agent. All secrets in them are
throw-away values of a sandbox.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssvm_worker.cloudstack.frame import HEADER, Frame, RawMessage
from tests.neighbours import ROOT

DATA = ROOT / "tests/data/cloudstack"


@dataclass(frozen=True)
class RecordedFrame:
    """A frame as the wire had it."""

    sender: str
    header: bytes
    content: str

    @property
    def compressed(self) -> bool:
        return bool(self.flags & 0x80)

    @property
    def flags(self) -> int:
        return HEADER.unpack(self.header)[2]

    @property
    def name(self) -> str:
        return next(iter(json.loads(self.content)[0])).rpartition(".")[2]

    def frame(self) -> Frame:
        """Return the frame, parsed by nothing of the product."""
        _, _, flags, sequence, _, server, agent, via = HEADER.unpack(self.header)
        messages = tuple(RawMessage(name, fields) for each in json.loads(self.content) for name, fields in each.items())
        return Frame(flags & ~0x80, sequence, messages, server, agent, via)


def _record(sender: str, header: str, content: str) -> RecordedFrame:
    return RecordedFrame(sender, bytes.fromhex(header), content)


def vectors() -> dict[str, tuple[RecordedFrame, dict[str, Any]]]:
    """Return the frames of the vectors with their descriptions, by name."""
    names = (DATA / "vectors/INDEX.txt").read_text().split()
    described = {name: json.loads((DATA / f"vectors/{name}.json").read_text()) for name in names}
    sender = {name: "agent" if name.startswith(("agent", "ans")) else "server" for name in names}
    return {
        name: (_record(sender[name], each["header_hex"], each["content"]), each)
        for name, each in described.items()
        if "header_hex" in each
    }


def conversations() -> dict[str, list[RecordedFrame]]:
    """Return the frames of each conversation, by its name."""
    return {path.stem: conversation(path) for path in sorted((DATA / "conversations").glob("*.jsonl"))}


def conversation(path: Path) -> list[RecordedFrame]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [_record(each["from"], each["header"], each["content"]) for each in lines]
