"""Background work of every worker, in threads of its main process. The ledger lets one worker act at a time."""

from __future__ import annotations

import logging

from ssvm_worker.config.schema import Settings
from ssvm_worker.operations.logs import about
from ssvm_worker.wiring.assembly import open_ledger
from ssvm_worker.wiring.celery_sender import queue_checker, send_wakeup

from .callbacks import CallbackSender
from .periodic import PeriodicThread
from .unknown_zones import UnknownZones

_LOG = logging.getLogger("ssvm.reaper")


class Reaper:
    """A thread that queues jobs again whose worker or message was lost, and threads that send callbacks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger = open_ledger(settings)
        # Rounds must be closer than claims are long. Otherwise the ledger takes the time between them for an outage.
        self._every_s = min(settings.ledger.reap_s, settings.ledger.claim_s / 4)
        self._rounds = PeriodicThread("reaper", self._reap, self._every_s)
        self._unknown_zones = UnknownZones(settings, self._ledger)
        self._callbacks = CallbackSender(settings, self._every_s)

    def start(self) -> None:
        """Start the threads."""
        self._rounds.start()
        self._callbacks.start()

    def stop(self) -> None:
        """Ask the threads to end. They hold nothing that must be released."""
        self._callbacks.stop()
        self._rounds.stop(1.0)

    def _reap(self) -> None:
        max_attempts, has_message = self._settings.retry.max_attempts, queue_checker(self._settings)
        for record in self._ledger.reap(self._every_s, max_attempts, has_message):
            with about(record.job_id):
                reason = record.error["message"] if record.error else "it waits without a message"
                _LOG.info("job %s gets a new message: %s", record.job_id, reason)
                send_wakeup(self._settings, record)
        self._unknown_zones.refuse()
        self._ledger.expire()
