"""What happens to jobs, as a Redis stream: each change of a state is an entry, written in the very step that makes it.

    <prefix>ssvm.ledger:events      fields: job_id job zone lane state attempt at, and of an ended job outcome (JSON)

A consumer group has its own place in it; an entry that its consumer did not acknowledge is given again. The last
50,000 or so are kept: a consumer that stays away for longer reads the records themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import redis

from .connection import connect, translated
from .record import ENDED

#: Seconds that one read waits in the broker; below the time-out of a connection.
_BLOCK_S = 2.0
#: Entries of one read.
_BATCH = 50
#: Seconds after which an entry that its consumer has not acknowledged is given to another one of the group.
_ABANDONED_S = 60.0


@dataclass(frozen=True)
class Event:
    """One change of a job's state."""

    #: The entry's id in the stream; grows with time.
    id: str
    job_id: str
    job: str
    zone: str
    lane: str
    state: str
    #: The number of the attempt that made it, 0 before the first.
    attempt: int
    #: Seconds since the epoch, by the broker's clock.
    at: float
    #: The result of a job that has succeeded, else its error; None while it has not ended.
    outcome: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        """Whether the job is in a final state."""
        return self.state in ENDED


class Events:
    """The stream behind one broker. Every method raises StoreUnavailable while the broker is away."""

    def __init__(self, url: str, *, prefix: str = "") -> None:
        self._url = url
        self._key = f"{prefix}ssvm.ledger:events"
        self._redis = connect(url)

    def read(self, group: str, consumer: str) -> Iterator[Event]:
        """Events for this consumer of the group, for ever, each at least once.

        An event is acknowledged when the next one is asked for. A new group begins with the oldest entry there is.
        What another consumer of the group took, and did not acknowledge for a minute, comes here.
        """
        self._ensure(group)
        start = "0"  # first what this consumer took before it was started anew
        while True:
            taken = self._take(group, consumer, start) or self._inherit(group, consumer)
            start = ">"
            for key, fields in taken:
                yield _event(key, fields)
                with translated(self._url):
                    self._redis.xack(self._key, group, key)

    def _ensure(self, group: str) -> None:
        with translated(self._url):
            try:
                self._redis.xgroup_create(self._key, group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    def _take(self, group: str, consumer: str, start: str) -> list[tuple[str, dict[str, str]]]:
        with translated(self._url):
            answer: Any = self._redis.xreadgroup(
                group, consumer, {self._key: start}, count=_BATCH, block=int(_BLOCK_S * 1000)
            )
        # One that was trimmed while it was pending has no fields any more.
        return [(key, fields) for _, entries in answer or () for key, fields in entries if fields]

    def _inherit(self, group: str, consumer: str) -> list[tuple[str, dict[str, str]]]:
        with translated(self._url):
            answer: Any = self._redis.xautoclaim(
                self._key, group, consumer, min_idle_time=int(_ABANDONED_S * 1000), count=_BATCH
            )
        return [(key, fields) for key, fields in answer[1] if fields]

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


def _event(key: str, fields: dict[str, str]) -> Event:
    outcome = fields.get("outcome", "")
    return Event(
        id=key,
        job_id=fields["job_id"],
        job=fields["job"],
        zone=fields["zone"],
        lane=fields["lane"],
        state=fields["state"],
        attempt=int(fields["attempt"] or 0),
        at=float(fields["at"]),
        outcome=json.loads(outcome) if outcome else None,
    )
