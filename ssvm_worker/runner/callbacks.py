"""Send callbacks in threads of each worker, as the settings say."""

from __future__ import annotations

import threading
from collections import Counter, deque
from urllib.parse import urlsplit

from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.callbacks import Callbacks, CallbackSettings
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.wiring.assembly import open_ledger, shown

from .periodic import PeriodicThread

#: Callbacks sent at once, and at once to one receiver. A slow receiver must leave threads to the others.
_MAX_SENDERS, _MAX_PER_RECEIVER = 8, 2
#: Due callbacks of one read. A longer queue is read page by page, so that one receiver cannot fill all pages.
_PAGE = 500


def open_callbacks(settings: Settings, ledger: Ledger) -> Callbacks:
    """Return the sender of single callbacks."""
    given = settings.callback
    return Callbacks(
        ledger,
        CallbackSettings(
            secret=given.secret.get_secret_value() if given.secret else None,
            timeout_s=given.timeout_s,
            rule=AddressRule(settings.networks_of(given)),
            max_tries=given.max_tries,
            ca_file=str(given.ca_file) if given.ca_file else None,
            policy=settings.retry,
        ),
        shown,
    )


class CallbackSender:
    """A thread that finds due callbacks, and threads that send them, a few at once to each receiver."""

    def __init__(self, settings: Settings, every_s: float) -> None:
        self._ledger = open_ledger(settings)
        self._callbacks = open_callbacks(settings, self._ledger)
        self._offset = 0
        self._due: dict[str, deque[str]] = {}
        self._busy: Counter[str] = Counter()
        self._sending: set[str] = set()
        self._changed = threading.Condition()
        self._finder = PeriodicThread("callbacks", self._find, every_s)
        self._senders = [PeriodicThread(f"callback-{number}", self._send, 0.0) for number in range(_MAX_SENDERS)]

    def start(self) -> None:
        """Start the threads."""
        for each in (self._finder, *self._senders):
            each.start()

    def stop(self) -> None:
        """Ask the threads to end. Another worker sends the remaining callbacks."""
        for each in (self._finder, *self._senders):
            each.stop()
        with self._changed:
            self._changed.notify_all()

    def _find(self) -> None:
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
        """Wait for a callback to a receiver below its limit. Return receiver and job id; "" and "" after ``stop``."""
        with self._changed:
            while not self._finder.stopping:
                for receiver, waiting in self._due.items():
                    if waiting and self._busy[receiver] < _MAX_PER_RECEIVER:
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
