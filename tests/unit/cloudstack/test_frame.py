"""Frames are those of CloudStack, byte by byte, and every other input is a BadFrame."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from typing import Any

import pytest

from ssvm_worker.cloudstack.frame import COMPRESSED, HEADER, MAX_JSON, REQUEST, BadFrame, Frame, RawMessage

from .recorded import RecordedFrame, conversations, vectors

VECTORS = vectors()
CONVERSATIONS = conversations()


def framed(content: bytes, flags: int = REQUEST, size: int | None = None, version: int = 0) -> bytes:
    """Return a frame with any content and any size in its header."""
    return HEADER.pack(version, 0, flags, 7, len(content) if size is None else size, -1, -1, -1) + content


def test_all_vectors_are_there() -> None:
    """Every vector that the index names is tested."""
    assert len(VECTORS) > 100


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name: str) -> None:
    """A vector of CloudStack's classes is decoded to its content, and encoded to its bytes."""
    recorded, described = VECTORS[name]
    written = recorded.frame().encode(ascii_only=False)
    decoded = Frame.decode(written)
    assert decoded == recorded.frame()
    assert written[: HEADER.size] == recorded.header
    assert [each.name for each in decoded.messages] == described["classes"]
    body = written[HEADER.size :]
    if recorded.compressed:
        assert gzip.decompress(body).decode() == recorded.content
    else:
        assert body.decode() == recorded.content
        assert hashlib.sha256(written).hexdigest() == described["sha256"]
        assert len(written) == described["frame_length"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation(name: str) -> None:
    """Every frame of a recorded conversation is encoded to the bytes on the wire."""
    # A size counts bytes in UTF-8. The Python agent of some conversations wrote JSON in another way, so only the
    # frames of Java are compared.
    frames = CONVERSATIONS[name]
    assert frames
    for recorded in frames:
        frame = recorded.frame()
        decoded = Frame.decode(recorded.header + _wire(recorded))
        assert decoded == frame
        if recorded.sender == "server" or name.startswith("real-ssvm"):
            assert frame.encode(ascii_only=False)[: HEADER.size] == recorded.header
            assert recorded.compressed or frame.encode(ascii_only=False)[HEADER.size :].decode() == recorded.content


def _wire(recorded: RecordedFrame) -> bytes:
    data = recorded.content.encode()
    return gzip.compress(data) if recorded.compressed else data


def test_ascii_only() -> None:
    """Our frames are ASCII, because a server's Java process may use any character set; their content is the same."""
    frame = Frame(REQUEST, 1, (RawMessage("a.B", {"text": "naïve 模板 😀 \u2028 <&='>"}),))
    written = frame.encode()
    assert written[HEADER.size :].isascii()
    assert Frame.decode(written) == frame
    assert HEADER.unpack_from(written)[4] == len(written) - HEADER.size


@pytest.mark.parametrize("size", [8191, 8192, 8193])
def test_compression_threshold(size: int) -> None:
    """JSON is compressed from 8192 bytes on, and the header has the size before compression."""
    overhead = len('[{"a.B":{"x":""}}]')
    written = Frame(REQUEST, 1, (RawMessage("a.B", {"x": "y" * (size - overhead)}),)).encode()
    _, _, flags, _, announced, *_ = HEADER.unpack_from(written)
    assert bool(flags & COMPRESSED) == (size >= 8192)
    assert announced == size


@pytest.mark.parametrize(
    ("request_flags", "answer_flags"), [(0x27, 0x06), (0x23, 0x02), (0x05, 0x24), (0x03, 0x22), (0x01, 0x20)]
)
def test_answer_flags(request_flags: int, answer_flags: int) -> None:
    """A response keeps stop-on-error and in-sequence, and inverts from-server; all numbers are those of the request."""
    request = Frame(request_flags, 0x7FC0000000000001, (), 0x2FC00000001, 1, 1)
    answer = request.answered([RawMessage("a.Answer")])
    assert answer.flags == answer_flags
    assert (answer.sequence, answer.server, answer.agent, answer.via) == (0x7FC0000000000001, 0x2FC00000001, 1, 1)


def test_large_numbers() -> None:
    """A sequence above 2^53 survives in the header and in JSON."""
    frame = Frame(REQUEST, 9205357638345293825, (RawMessage("a.B", {"id": 9205357638345293825}),))
    assert Frame.decode(frame.encode()) == frame


def test_no_secret_in_repr() -> None:
    """The repr of a frame has the names of its messages, and no field."""
    frame = Frame(REQUEST, 1, (RawMessage("a.B", {"password": "hunter2"}),))
    assert "a.B" in repr(frame)
    assert "hunter2" not in repr(frame)
    assert "hunter2" not in str(frame.messages[0])


GOOD = b'[{"a.B":{}}]'
BAD: dict[str, bytes] = {
    "empty": b"",
    "half a header": b"\0" * 39,
    "no content": framed(b""),
    "version 2": framed(GOOD, version=1),
    "size too small": framed(GOOD, size=len(GOOD) - 1),
    "size too large": framed(GOOD, size=len(GOOD) + 1),
    "negative size": framed(GOOD, size=-1),
    "size above the limit": framed(GOOD, size=MAX_JSON + 1),
    "not gzip": framed(GOOD, REQUEST | COMPRESSED),
    "gzip cut": framed(gzip.compress(GOOD * 99)[:-9], REQUEST | COMPRESSED, len(GOOD) * 99),
    "gzip bomb": framed(gzip.compress(b" " * 50_000_000), REQUEST | COMPRESSED, len(GOOD)),
    "gzip of less": framed(gzip.compress(GOOD), REQUEST | COMPRESSED, len(GOOD) + 1),
    "zlib, not gzip": framed(zlib.compress(GOOD), REQUEST | COMPRESSED, len(GOOD)),
    "cut JSON": framed(GOOD[:-1]),
    "not JSON": framed(b"\xff\xfe\x00"),
    "NaN": framed(b'[{"a.B":{"x":NaN}}]'),
    "a number of 5000 digits": framed(b'[{"a.B":{"x":' + b"9" * 5000 + b"}}]"),
    "no list": framed(b'{"a.B":{}}'),
    "empty list": framed(b"[]"),
    "number": framed(b"1"),
    "two keys": framed(b'[{"a.B":{},"a.C":{}}]'),
    "no key": framed(b"[{}]"),
    "no fields": framed(b'[{"a.B":null}]'),
    "deep lists": framed(b'[{"a.B":{"x":' + b"[" * 100 + b"]" * 100 + b"}}]"),
    "very deep lists": framed(b"[" * 200_000),
    "very deep objects": framed(b'[{"a.B":' + b'{"x":' * 100_000 + b"1" + b"}" * 100_000 + b"}]"),
    "many messages": framed(b"[" + b",".join([b'{"a.B":{}}'] * 1000) + b"]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_frames(case: str) -> None:
    """A cut, inconsistent, too large or too deep frame is a BadFrame, and its error has one short line."""
    with pytest.raises(BadFrame) as caught:
        Frame.decode(BAD[case])
    assert len(str(caught.value)) < 400
    readable = case not in ("empty", "half a header", "version 2")
    assert bool(caught.value.head) == readable, "the receiver refuses a request whose header it knows"
    if caught.value.head:
        assert caught.value.head.sequence == 7


def test_other_character_set() -> None:
    """The text of a server that does not use UTF-8 is read, because only names for people have such characters."""
    frame = Frame.decode(framed(b'[{"a.B":{"x":"na\xefve"}}]'))
    assert frame.messages[0].content == {"x": "naïve"}


def test_common_fields() -> None:
    """A completed message has the three fields of every message, and keeps those that it had."""
    done: dict[str, Any] = RawMessage("a.B", {"wait": 5, "x": 1}).completed().content
    assert done == {"wait": 5, "x": 1, "contextMap": {}, "bypassHostMaintenance": False}
    assert json.dumps(done)
