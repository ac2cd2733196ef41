"""Encode and decode frames: a header of 40 bytes and JSON, as CloudStack's agents and management servers send them.

The facts come from frames of CloudStack 4.23. ``tests/data/cloudstack`` has them. All numbers are big-endian.

=======  ======================================================================
version  one byte: 0 (v1). A zero byte follows
flags    16 bits: see the constants
sequence 64 bits: an answer has the sequence of its request
size     32 bits: bytes of the JSON before compression
server   64 bits: the management server (mgmtId). -1 in requests of an agent
agent    64 bits: the id of the host. -1 while it is unknown
via      64 bits: the agent that forwards. For secondary storage: the same id
=======  ======================================================================

The JSON is a list of objects with one key each: ``[{"com.cloud.agent.api.ReadyCommand": {…}}]``.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ssvm_worker.errors import Permanent
from ssvm_worker.units import KiB, MiB, printable

REQUEST, STOP_ON_ERROR, IN_SEQUENCE, FROM_SERVER, CONTROL, COMPRESSED = 0x01, 0x02, 0x04, 0x20, 0x40, 0x80

#: The layout of the header.
HEADER = struct.Struct(">BBHqiqqq")
#: CloudStack compresses JSON from this size.
COMPRESS_FROM = 8 * KiB
#: The maximum of JSON in a frame, in bytes. The answer to ListTemplateCommand has about 300 bytes for each template.
MAX_JSON = 32 * MiB
#: The maximum of nested JSON lists and objects. Messages of CloudStack have about 10.
MAX_DEPTH = 64
#: The maximum of messages in a frame. CloudStack sends one.
MAX_MESSAGES = 64

#: Characters that CloudStack's JSON library escapes although JSON does not require it.
_ESCAPES = {character: f"\\u{ord(character):04x}" for character in "=&<>'\u2028\u2029"}
_ESCAPED = re.compile(f"[{''.join(_ESCAPES)}]")


class BadFrame(Permanent):
    """A frame that cannot be decoded.

    ``head`` is the frame without its messages if the header was readable. So the receiver can still refuse the request.
    """

    head: Frame | None = None


@dataclass(frozen=True, slots=True)
class RawMessage:
    """One command or answer: the full name of its Java class, and its fields.

    The fields may contain passwords and keys. So ``repr`` shows the name only.
    """

    name: str
    content: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def short(self) -> str:
        """Return the name of the class without its package: ``ReadyCommand``."""
        return self.name.rpartition(".")[2]

    def completed(self) -> RawMessage:
        """Return the message with the three fields that every message has, where they are absent."""
        always = {"contextMap": {}, "wait": 0, "bypassHostMaintenance": False}
        return RawMessage(
            self.name, self.content | {key: each for key, each in always.items() if key not in self.content}
        )


#: Answers one command of the server. A CommandPool calls it in a thread for each frame. The server keeps the order of
#: commands in sequence. A WorkerError becomes an ``Answer`` with ``result: false`` and the text of the error. The
#: answer has the fields that every message has.
Handler = Callable[[RawMessage], RawMessage]


@dataclass(frozen=True, slots=True)
class Frame:
    """One request or response."""

    flags: int
    sequence: int
    messages: tuple[RawMessage, ...] = ()
    server: int = -1
    agent: int = -1
    via: int = -1

    @property
    def number(self) -> int:
        """Return the lower 48 bits of the sequence, for logs. A server counts there, from 1 for each connection."""
        return self.sequence & 0xFFFF_FFFF_FFFF

    @property
    def is_request(self) -> bool:
        """Return whether the peer expects a response to this frame."""
        return bool(self.flags & REQUEST)

    @property
    def in_sequence(self) -> bool:
        """Return whether the server sends its next command in sequence only after the answer to this one."""
        return bool(self.flags & IN_SEQUENCE)

    @property
    def stop_on_error(self) -> bool:
        """Return whether a failed command ends the commands after it in this frame."""
        return bool(self.flags & STOP_ON_ERROR)

    def answered(self, answers: Sequence[RawMessage]) -> Frame:
        """Return the response to this request.

        The server finds the waiting command by sequence, server and agent. It sends the next command in sequence only
        after a response with that flag.
        """
        flags = self.flags & (STOP_ON_ERROR | IN_SEQUENCE) | (~self.flags & FROM_SERVER)
        return replace(self, flags=flags, messages=tuple(answers))

    def encode(self, *, ascii_only: bool = True) -> bytes:
        """Return the bytes of the frame.

        *ascii_only*: escape all other characters. CloudStack does not, but reads bytes in the character set of its
        Java process, which may not be UTF-8.
        """
        text = to_json([{each.name: each.content} for each in self.messages], ascii_only=ascii_only)
        data = text.encode("utf-8", "surrogatepass")
        compress = len(data) >= COMPRESS_FROM
        flags = self.flags & ~COMPRESSED | (COMPRESSED if compress else 0)
        header = HEADER.pack(0, 0, flags, self.sequence, len(data), self.server, self.agent, self.via)
        return header + (gzip.compress(data, mtime=0) if compress else data)

    @classmethod
    def decode(cls, data: bytes) -> Frame:
        """Return the frame of these bytes. Raise BadFrame for all others. Uses at most MAX_JSON for the JSON text."""
        if len(data) < HEADER.size:
            raise BadFrame(f"A frame has {len(data)} bytes, which is less than its header")
        version, _, flags, sequence, size, server, agent, via = HEADER.unpack_from(data)
        if version:
            raise BadFrame(f"A frame has version {version} of the protocol", "", "Only version 0 (v1) is known")
        frame = cls(flags & ~COMPRESSED, sequence, (), server, agent, via)
        try:
            text = _content(data[HEADER.size :], size, bool(flags & COMPRESSED))
            return replace(frame, messages=_messages(text))
        except BadFrame as error:
            error.head = frame
            raise


def to_json(value: Any, *, ascii_only: bool = True) -> str:
    """Return JSON with the escapes of CloudStack's library (Gson), which also escapes ``= & < > '``."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=False)
    return _ESCAPED.sub(lambda found: _ESCAPES[found[0]], text)


def _content(data: bytes, size: int, compressed: bool) -> bytes:
    """Return the JSON of a frame, decompressed. Raise BadFrame if its size differs from the header."""
    if not 0 <= size <= MAX_JSON:
        raise BadFrame(f"A frame announces {size} bytes of JSON; 0 to {MAX_JSON} are allowed")
    if compressed:
        inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            data = inflater.decompress(data, size + 1)
        except zlib.error as error:
            raise BadFrame(f"The compressed content of a frame is damaged: {error}") from error
        if not inflater.eof and len(data) <= size:
            raise BadFrame("The compressed content of a frame is incomplete")
    if len(data) != size:
        more = "more" if len(data) > size else f"{len(data)}"
        raise BadFrame(f"A frame announces {size} bytes of JSON and has {more}")
    return data


def _messages(data: bytes) -> tuple[RawMessage, ...]:
    """Parse the JSON of a frame."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # a server whose Java process does not use UTF-8
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"The content of a frame is not valid JSON: {printable(str(error))[:200]}") from error
    if _depth_exceeds(value, MAX_DEPTH):
        raise BadFrame(f"The JSON of a frame has more than {MAX_DEPTH} nested levels")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise BadFrame(f"The JSON of a frame is not a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    for each in value:
        if not isinstance(each, dict) or len(each) != 1:
            raise BadFrame("A message of a frame is not an object with the class as its only key")
        ((name, content),) = each.items()
        if not isinstance(content, dict):
            raise BadFrame(f"The message {printable(name)[:200]} of a frame has no fields")
        messages.append(RawMessage(name, content))
    return tuple(messages)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # a JSON library reads 1e999 so, and cannot write it
        raise ValueError("a number is too large")
    return number


#: Made once: to make it costs more than to parse a command.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Return whether lists and objects are nested deeper. Does not recurse."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        children = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return bool(level)
