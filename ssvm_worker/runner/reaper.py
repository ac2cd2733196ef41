"""What every worker does beside its jobs, in threads of its main process; of all workers, one at a time acts."""

from __future__ import annotations

import logging

from ssvm_worker.config.schema import Settings
from ssvm_worker.operations.logs import about
from ssvm_worker.wiring.assembly import open_ledger
from ssvm_worker.wiring.celery_sender import ring, standing

from .callbacks import CallbackSender
from .periodic import PeriodicThread

_LOG = logging.getLogger("ssvm.reaper")


class Reaper:
    """One thread queues again what lost its worker or its message; others send callbacks, which may hang."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger = open_ledger(settings)
        # Rounds must be closer than claims are long, or the ledger takes the time between them for an outage.
        self._every_s = min(settings.ledger.reap_s, settings.ledger.claim_s / 4)
        self._rounds = PeriodicThread("reaper", self._reap, self._every_s)
        self._outbox = CallbackSender(settings, self._every_s)

    def start(self) -> None:
        """Begin."""
        self._rounds.start()
        self._outbox.start()

    def stop(self) -> None:
        """Tell the threads to end; they hold nothing that would have to be put back."""
        self._outbox.stop()
        self._rounds.stop(1.0)

    def _reap(self) -> None:
        attempts, stands = self._settings.retry.max_attempts, standing(self._settings)
        for record in self._ledger.reap(self._every_s, attempts, stands):
            with about(record.job_id):
                _LOG.info("job %s is rung: %s", record.job_id, record.error["message"] if record.error else "it waits")
                ring(self._settings, record)
        self._ledger.expire()
