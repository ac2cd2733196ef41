"""Answer senders that name a zone without workers. Otherwise no worker would read their messages.

A zone is known if a worker of it was up within a day. It is also known if a job of it runs or has succeeded. A message
for another zone becomes a queued job. A queued job of such a zone fails after ``ledger.unknown_zone_s`` seconds. A
worker that starts before takes it as usual.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ssvm_worker.config.findings import suggestion
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import InvalidRequest, ObjectNotFound
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import QUEUED, RUNNING, SUCCEEDED, queue_name
from ssvm_worker.operations.traces import traceparent
from ssvm_worker.wiring.assembly import open_registry, open_waiting_messages

from .messages import Message, accept, refuse, screen

_LOG = logging.getLogger("ssvm.reaper")
#: Seconds between two rounds. A round reads the names of all keys of the broker.
_EVERY_S = 60.0


@dataclass
class WaitingMessage:
    """An element of a Redis list with the fields of kombu's message that ``screen`` reads."""

    delivery_info: dict[str, Any]
    problem: str = ""
    headers: dict[str, Any] = field(default_factory=dict)
    content_type: Any = None
    content_encoding: Any = None
    body: Any = None

    @classmethod
    def of(cls, text: str, queue: str) -> WaitingMessage:
        """Return the message. ``problem`` says why it cannot be read."""
        found = cls({"exchange": "", "routing_key": queue})
        try:
            given = json.loads(text)
            found.headers = dict(given["headers"])
            found.content_type, found.content_encoding = given.get("content-type"), given.get("content-encoding")
            found.body = given["body"]
            if given["properties"].get("body_encoding") == "base64":
                found.body = base64.b64decode(found.body).decode()
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            found.problem = f"The message cannot be read: {type(error).__name__}"
        return found


class UnknownZones:
    """The rounds of one process. In each minute, one of all processes acts."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self._every_s = min(_EVERY_S, settings.ledger.unknown_zone_s)
        self._next = 0.0

    def refuse(self) -> None:
        """Run a round if one is due. Do nothing while no zone is known."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_s
        settings, ledger = self._settings, self._ledger
        with closing(open_waiting_messages(settings)) as messages, closing(open_registry(settings)) as registry:
            if not messages.take_turn(self._every_s):
                return
            up = {each.info.zone for each in registry.workers()}
            if not up:
                return
            known = up | ledger.zones(RUNNING, SUCCEEDED) | {settings.zone}
            waiting = [] if settings.broker.messages else messages.queues()
            for zone, lane in (each for each in waiting if each[0] not in known):
                there = settings.model_copy(update={"zone": zone})
                for text in messages.oldest(zone, lane):
                    if _adopt(there, ledger, WaitingMessage.of(text, queue_name(zone, lane))):
                        messages.remove(zone, lane, text)
        for zone in ledger.zones(QUEUED) - known:
            self._refuse_jobs(zone, known)

    def _refuse_jobs(self, zone: str, known: set[str]) -> None:
        """End the jobs of an unknown zone that are queued for too long."""
        what = f"No worker serves zone {zone}{suggestion(zone, known).removesuffix('?')}"
        remedy = "Start a worker of this zone and retry the job, or submit it for another zone"
        error = InvalidRequest(what, f"zone {zone}", remedy)
        for record in self._ledger.page(state=QUEUED, zone=zone, limit=1000):
            is_old = time.time() - record.updated > self._settings.ledger.unknown_zone_s
            if is_old and self._ledger.refuse_queued(record.job_id, error):
                _LOG.error("job %s is refused: %s", record.job_id, error)


def _adopt(settings: Settings, ledger: Ledger, message: WaitingMessage) -> bool:
    """Store the job of a message. Return False for a message that must stay: it wakes a worker for a known job."""
    try:
        screen(message)
        name, args = message.headers["task"].removeprefix("ssvm."), json.loads(message.body)[0]
        found = Message(name, args, {}, message.headers["id"], traceparent(message.headers.get("traceparent")))
        if found.is_wakeup and not ledger.get(found.job_id).ended:
            return False
        accept(ledger, settings, found)
    except (InvalidRequest, ObjectNotFound) as error:
        _LOG.error("a message for zone %s is refused: %s", settings.zone, error)
        refuse(ledger, settings, message, error)
    return True
