"""Changes of jobs' states, as a Redis stream. The script that changes a state adds the entry in the same step.

    <prefix>ssvm.ledger:events      fields: job_id job zone lane state attempt at; outcome (JSON) for an ended job

The broker remembers the position of each consumer group. It delivers an entry again if the consumer did not
acknowledge it. The stream keeps about 50,000 entries. A consumer that is away for longer must read the records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .connection import BrokerClient, redis, translated
from .record import ENDED

#: Seconds that one read waits in the broker; less than the time-out of a connection.
_BLOCK_S = 2.0
#: Number of entries in one read.
_BATCH = 50
#: Seconds after which an unacknowledged entry goes to another consumer of the group.
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
    #: The number of the attempt that made the change; 0 before the first attempt.
    attempt: int
    #: Seconds since the epoch, by the broker's clock.
    at: float
    #: The result of a job that succeeded, or the error of another ended job; None before the end.
    outcome: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        """Return whether the job is in a final state."""
        return self.state in ENDED


class Events(BrokerClient):
    """The stream of one broker. Every method raises StoreUnavailable while the broker is away."""

    _NAME = "ssvm.ledger:events"

    def read(self, group: str, consumer: str) -> Iterator[Event]:
        """Yield events for this consumer of the group without end, each at least once.

        A request for the next event acknowledges the previous one. A new group starts with the oldest entry.
        Entries that another consumer of the group did not acknowledge for a minute are yielded too.
        """
        with translated(self._url):
            try:
                self._redis.xgroup_create(self._key, group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise
        start = "0"  # first the entries that this consumer read before a restart
        while True:
            entries = self._read_new(group, consumer, start) or self._read_abandoned(group, consumer)
            start = ">"
            for key, fields in entries:
                if event := _event(key, fields):
                    yield event
                with translated(self._url):
                    self._redis.xack(self._key, group, key)

    def _read_new(self, group: str, consumer: str, start: str) -> list[tuple[str, dict[str, str]]]:
        with translated(self._url):
            answer: Any = self._redis.xreadgroup(
                group, consumer, {self._key: start}, count=_BATCH, block=int(_BLOCK_S * 1000)
            )
        # An entry that the broker trimmed while it was pending has no fields.
        return [(key, fields) for _, entries in answer or () for key, fields in entries if fields]

    def _read_abandoned(self, group: str, consumer: str) -> list[tuple[str, dict[str, str]]]:
        with translated(self._url):
            answer: Any = self._redis.xautoclaim(
                self._key, group, consumer, min_idle_time=int(_ABANDONED_S * 1000), count=_BATCH
            )
        return [(key, fields) for key, fields in answer[1] if fields]


def _event(key: str, fields: Mapping[str, str]) -> Event | None:
    """Return the event of an entry. None: another program has written it, and it must not stop the consumer."""
    names = ("job_id", "job", "zone", "lane", "state")
    try:
        outcome = json.loads(fields.get("outcome") or "null")
        job_id, job, zone, lane, state = (fields[name] for name in names)
        return Event(key, job_id, job, zone, lane, state, int(fields["attempt"] or 0), float(fields["at"]), outcome)
    except (KeyError, ValueError, RecursionError):
        return None
