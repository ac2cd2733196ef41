"""The agents of management servers: which one holds a GUID, and how their commands ended.

``<prefix>ssvm.agents`` is a hash of claims by GUID, as JSON with times of the broker's clock.
``<prefix>ssvm.agents:answers`` and ``:seconds`` are hashes of counters by command, result and duration.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .connection import BrokerClient, translated
from .record import iso

#: Limits in seconds of the buckets of answer times. The last one has no limit.
BUCKETS = (0.05, 0.5, 5.0, 30.0)
#: Seconds after which the list omits an agent that is gone.
_FORGET_S = 24 * 3600


@dataclass(frozen=True)
class AgentInfo:
    """The description that an agent gives of itself."""

    host: str
    pid: int
    zone: str
    version: str
    #: The management server that it is connected to, or "".
    server: str = ""
    #: The id of the host, while it is Up.
    host_id: int | None = None
    #: Seconds since the epoch, by its clock, at which it got Up.
    up_since: float | None = None
    #: Headers of commands without an answer, for which the server blocks the host: flags, sequence, server, agent.
    unanswered: tuple[tuple[int, int, int, int], ...] = ()
    #: Seconds since the epoch at which a server last ended the connection just after Up, as for a second agent.
    replaced_at: float | None = None


_FIELDS = {each.name for each in fields(AgentInfo)}


@dataclass(frozen=True)
class AgentClaim:
    """A GUID and the agent that holds it, or held it last."""

    guid: str
    info: AgentInfo
    #: Whether the claim is valid now.
    held: bool
    #: Seconds since the epoch of the last renewal, by the broker's clock.
    seen: float

    @property
    def connected(self) -> bool:
        """Return whether an agent holds the GUID and its host is Up."""
        return self.held and self.info.host_id is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the public JSON."""
        since = None if self.info.up_since is None else iso(self.info.up_since)
        values = {"guid": self.guid, "held": self.held, "connected": self.connected, "seen": iso(self.seen)}
        described = asdict(self.info)
        del described["unanswered"], described["replaced_at"]
        return values | described | {"up_since": since}


@dataclass(frozen=True)
class AnswerCounts:
    """The answers to one class of commands with one result."""

    command: str
    #: ok | failed
    result: str
    #: Number of answers in each bucket of BUCKETS, and beyond.
    buckets: tuple[int, ...]
    #: Sum of the seconds.
    seconds: float


class AgentRegistry(BrokerClient):
    """The agents of one broker. Every method raises StoreUnavailable while the broker is away. Thread-safe."""

    _NAME = "ssvm.agents"
    _SCRIPTS = ("agent_hold",)

    def hold(self, guid: str, holder: str, seconds: float, info: AgentInfo) -> AgentInfo | None:
        """Take or renew the claim to a GUID for so many seconds, and store *info*. 0 seconds release it.

        Returns what the agent that held the GUID before has stored, or *info*. Returns None if another *holder* has it.
        """
        with translated(self._url):
            args = [self._key, guid, holder, seconds, json.dumps(asdict(info))]
            before: str | None = self._scripts["agent_hold"](args=args)
        if before is None:
            return None
        return (_info(before) if before else None) or info

    def agents(self) -> list[AgentClaim]:
        """Return all agents that were seen within a day, by GUID."""
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            pipe.hgetall(self._key)
            pipe.time()
            claims, (seconds, micros) = pipe.execute()
        now = seconds + micros / 1e6
        found = [each for guid in sorted(claims) if (each := _claim(guid, claims[guid], now))]
        return [each for each in found if each.seen > now - _FORGET_S]

    def note(self, counts: Mapping[tuple[str, str, int], int], seconds: Mapping[tuple[str, str], float]) -> None:
        """Add answers: their number by command, result and index of the bucket, and their seconds."""
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            for (command, result, bucket), number in counts.items():
                pipe.hincrby(f"{self._key}:answers", f"{command} {result} {bucket}", number)
            for (command, result), sum_s in seconds.items():
                pipe.hincrbyfloat(f"{self._key}:seconds", f"{command} {result}", sum_s)
            pipe.execute()

    def answers(self) -> list[AnswerCounts]:
        """Return the counters of all agents together, by command and result."""
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            pipe.hgetall(f"{self._key}:answers")
            pipe.hgetall(f"{self._key}:seconds")
            numbers, seconds = pipe.execute()
        found: dict[tuple[str, str], Counter[int]] = {}
        for name, number in numbers.items():
            command, result, bucket = name.split(" ")
            found.setdefault((command, result), Counter())[int(bucket)] += int(number)
        return [
            AnswerCounts(
                *kind, tuple(counts[each] for each in range(len(BUCKETS) + 1)), float(seconds.get(" ".join(kind), 0))
            )
            for kind, counts in sorted(found.items())
        ]


def _claim(guid: str, text: str, now: float) -> AgentClaim | None:
    """Return the claim, or None for an unreadable one, which must not hide the others."""
    try:
        values = json.loads(text)
        if (info := _info(values["info"])) is None:
            return None
        return AgentClaim(guid, info, now < values["until"] < now + 3600, float(values["seen"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _info(text: str) -> AgentInfo | None:
    """Return the description, or None for an unreadable one. A newer version may have more fields."""
    try:
        known = {name: value for name, value in json.loads(text).items() if name in _FIELDS}
        unanswered = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in known.get("unanswered", ()))
        return AgentInfo(**known | {"unanswered": unanswered})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
