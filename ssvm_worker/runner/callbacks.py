"""Who hears of a job's end: the callbacks, by the settings; each worker sends them in threads of its own."""

from __future__ import annotations

import threading
from collections import Counter, deque
from urllib.parse import urlsplit

from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.callbacks import Callbacks, CallbackSettings
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.retry_policy import RetryPolicy
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.wiring.assembly import open_ledger, shown

from .periodic import PeriodicThread

#: Callbacks on their way at once, and of those so many to one receiver: a slow one must leave threads to others.
_AT_ONCE, _TO_ONE = 8, 2
#: Due callbacks of one look. A longer queue is looked at page by page, so that one receiver cannot fill them all.
_PAGE = 500


def open_outbox(settings: Settings, ledger: Ledger) -> Callbacks:
    """The callbacks of the ledger."""
    given, retry = settings.callback, settings.retry
    return Callbacks(
        ledger,
        CallbackSettings(
            secret=given.secret.get_secret_value() if given.secret else None,
            timeout_s=given.timeout_s,
            rule=AddressRule(settings.networks_of(given)),
            max_tries=given.max_tries,
            ca_file=str(given.ca_file) if given.ca_file else None,
            policy=RetryPolicy(first_delay_s=retry.first_delay_s, max_delay_s=retry.max_delay_s),
        ),
        shown,
    )


class CallbackSender:
    """One thread looks for callbacks that are due, others send them, a few to each receiver."""

    def __init__(self, settings: Settings, every_s: float) -> None:
        self._ledger = open_ledger(settings)
        self._callbacks = open_outbox(settings, self._ledger)
        self._offset = 0
        self._due: dict[str, deque[str]] = {}
        self._busy: Counter[str] = Counter()
        self._sending: set[str] = set()
        self._changed = threading.Condition()
        self._look_out = PeriodicThread("callbacks", self._look, every_s)
        self._senders = [PeriodicThread(f"callback-{number}", self._send, 0.0) for number in range(_AT_ONCE)]

    def start(self) -> None:
        """Begin."""
        for each in (self._look_out, *self._senders):
            each.start()

    def stop(self) -> None:
        """Tell the threads to end; a callback that is not sent is sent by another worker."""
        for each in (self._look_out, *self._senders):
            each.stop()
        with self._changed:
            self._changed.notify_all()

    def _look(self) -> None:
        found = self._ledger.due_callbacks(_PAGE, self._offset)
        self._offset = self._offset + _PAGE if len(found) == _PAGE else 0
        due: dict[str, deque[str]] = {}
        with self._changed:
            for job_id, url in found.items():
                if job_id not in self._sending:
                    due.setdefault(_receiver(url), deque()).append(job_id)
            self._due = due
            self._changed.notify_all()

    def _send(self) -> None:
        receiver, job_id = self._next()
        if not job_id:
            return
        try:
            self._callbacks.send_due(job_id)
        finally:
            with self._changed:
                self._busy[receiver] -= 1
                self._sending.discard(job_id)
                self._changed.notify_all()

    def _next(self) -> tuple[str, str]:
        """The next callback of a receiver that has room; "" twice when the threads are told to end."""
        with self._changed:
            while not self._look_out.stopping:
                for receiver, waiting in self._due.items():
                    if waiting and self._busy[receiver] < _TO_ONE:
                        job_id = waiting.popleft()
                        self._busy[receiver] += 1
                        self._sending.add(job_id)
                        return receiver, job_id
                self._changed.wait()
        return "", ""


def _receiver(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return url
