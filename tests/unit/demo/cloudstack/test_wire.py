"""The simulated server's frames against those of CloudStack's own classes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ssvm_worker.demo.cloudstack.wire import LinkClosed, WireFrame, to_json
from tests.neighbours import ROOT

VECTORS = sorted((ROOT / "tests/data/cloudstack/vectors").glob("*-*.json"))
FRAMES = [each for each in VECTORS if "header_hex" in each.read_text()]


@pytest.mark.parametrize("path", FRAMES, ids=lambda each: each.stem)
def test_vector(path: Path) -> None:
    """A frame that CloudStack wrote is decoded and encoded without a difference."""
    vector = json.loads(path.read_text())
    content = json.loads(vector["content"])
    header = bytes.fromhex(vector["header_hex"])
    frame = WireFrame.decode(header[:2] + _uncompressed(header) + header[4:] + vector["content"].encode())
    assert [dict([each]) for each in frame.messages] == content
    assert to_json(frame.messages) == vector["content"]
    encoded = frame.encode()
    if vector["compressed"]:
        assert encoded[:40] == header
        assert WireFrame.decode(encoded).messages == frame.messages
    else:
        assert hashlib.sha256(encoded).hexdigest() == vector["sha256"]


def _uncompressed(header: bytes) -> bytes:
    return (int.from_bytes(header[2:4], "big") & ~0x80).to_bytes(2, "big")


@pytest.mark.parametrize(
    "data",
    [b"", bytes(39), b"\1" + bytes(39), bytes(40) + b"[]", bytes(8) + b"\0\0\0\0\0\0\0\7" + bytes(24)],
    ids=["empty", "short", "version", "too long", "sizes"],
)
def test_inconsistent_frame(data: bytes) -> None:
    """A frame whose header contradicts its content is refused."""
    with pytest.raises(LinkClosed):
        WireFrame.decode(data)
