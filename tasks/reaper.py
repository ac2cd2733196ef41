"""What every worker does beside its jobs, in threads of its main process; of all workers, one at a time acts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ssvm_worker.assembly import open_ledger
from ssvm_worker.errors import WorkerError
from ssvm_worker.logs import about
from ssvm_worker.settings import Settings

from .outbox import open_outbox
from .queues import standing
from .ring import ring

_LOG = logging.getLogger("ssvm.reaper")


class Reaper:
    """Two threads: one queues again what lost its worker or its message, one sends callbacks, which may hang."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ledger = open_ledger(settings)
        self._outbox = open_outbox(settings, self._ledger)
        # Rounds must be closer than claims are long, or the ledger takes the time between them for an outage.
        self._every_s = min(settings.ledger.reap_s, settings.ledger.claim_s / 4)
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(act,), name=act.__name__, daemon=True)
            for act in (self._reap, self._send_callbacks)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Tell the threads to end; they hold nothing that would have to be put back."""
        self._over.set()
        for thread in self._threads:
            thread.join(1.0)

    def _repeat(self, act: Callable[[], None]) -> None:
        while not self._over.wait(self._every_s):
            try:
                act()
            except WorkerError as error:
                _LOG.warning("%s", error)
            except Exception:  # noqa: BLE001 - one odd record must not leave all other jobs unattended
                _LOG.exception("a round failed")

    def _reap(self) -> None:
        attempts, stands = self._settings.retry.max_attempts, standing(self._settings)
        for record in self._ledger.reap(self._every_s, attempts, stands):
            with about(record.job_id):
                _LOG.info("job %s is rung: %s", record.job_id, record.error["message"] if record.error else "it waits")
                ring(self._settings, record)
        self._ledger.expire()

    def _send_callbacks(self) -> None:
        while not self._over.is_set() and self._outbox.send_due():
            pass
