"""Send this worker's heartbeat to the registry: its place, its lanes, its load, and whether it is stopping."""

from __future__ import annotations

import atexit
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace

from ssvm_worker import __version__
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.workers import WorkerInfo
from ssvm_worker.operations.mounts import stores_away
from ssvm_worker.wiring.assembly import open_registry
from ssvm_worker.wiring.server_names import with_server_stores

from .periodic import PeriodicThread

_LOG = logging.getLogger("ssvm.registration")
#: Seconds between two heartbeats.
_EVERY_S = 2.0


class WorkerRegistration:
    """A thread of the worker's main process."""

    def __init__(
        self, settings: Settings, name: str, *, active: Callable[[], int], connected: Callable[[], bool]
    ) -> None:
        """*active* counts the running jobs of this worker. *connected* returns whether it can receive messages."""
        self._settings = settings
        self._active, self._connected = active, connected
        self._registry = open_registry(settings)
        self._info = WorkerInfo(
            name=name,
            host=socket.gethostname(),
            zone=settings.zone,
            lanes=tuple(settings.worker.lanes),
            capacity=settings.worker.concurrency,
            version=__version__,
            started=time.time(),
            every_s=_EVERY_S,
        )
        self._stopping = False
        self._rounds = PeriodicThread("registrar", self._beat, _EVERY_S)

    def start(self) -> None:
        """Start the thread. The worker stays registered until its process ends, because jobs may run after ``stop``."""
        self._rounds.once()
        self._rounds.start()
        atexit.register(self._leave)

    def stop(self) -> None:
        """Register that the worker takes no new job."""
        self._stopping = True
        self._rounds.once()

    def _beat(self) -> None:
        active = self._active()
        away = stores_away(with_server_stores(self._settings))
        info = replace(self._info, active=active, draining=self._stopping, away=away, connected=self._connected())
        self._registry.beat(info)

    def _leave(self) -> None:
        """Remove the worker from the registry. A killed worker cannot do this: it counts as down after a while."""
        try:
            self._registry.leave(self._info.name)
        except WorkerError as error:
            _LOG.warning("%s", error)
