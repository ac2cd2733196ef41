"""Probe the NFS mounts of this host, and unmount those that its workers mounted and no longer use."""

from __future__ import annotations

import atexit
import logging
import time

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.operations.mounts import nfs_mounts
from ssvm_worker.stores.nfs.circuit_breaker import CLOSED
from ssvm_worker.stores.nfs.mount import Mounted
from ssvm_worker.wiring.server_names import with_server_stores

from .periodic import PeriodicThread

_LOG = logging.getLogger("ssvm.mounts")
#: Seconds between two searches for hung processes that asked to be ended.
_OFTEN_S = 1.0


class MountKeeper:
    """A thread of the worker's main process, which itself uses no mount."""

    def __init__(self, settings: Settings) -> None:
        self._idle_s = settings.nfs.idle_s
        self._every_s = min(settings.nfs.probe_every_s, settings.nfs.idle_s)
        self._settings = settings
        #: Mounts by their directories. Those of stores that a management server names are added later.
        self._known = {each.paths.slug: each for each in nfs_mounts(settings)}
        self._due = time.monotonic() + self._every_s
        self._rounds = PeriodicThread("mounts", self._round, min(_OFTEN_S, self._every_s))

    def start(self) -> None:
        """Start the thread. The last unmount is at the end of the process, because jobs may run after ``stop``."""
        self._rounds.start()
        atexit.register(self._unmount_unused, 0.0)

    def stop(self) -> None:
        """Ask the thread to end."""
        self._rounds.stop()

    def _round(self) -> None:
        for each in list(self._known.values()):
            try:
                each.abort_marked_processes()  # possible here, because this process has no file open on a mount
            except (WorkerError, OSError) as error:
                _LOG.error("a process that hangs cannot be ended: %s", error)
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._every_s
        try:  # add the mounts of stores that a management server has named since the last round
            for each in nfs_mounts(with_server_stores(self._settings)):
                self._known.setdefault(each.paths.slug, each)
        except WorkerError as error:
            _LOG.info("the stores of the management server are unknown: %s", error)
        for each in list(self._known.values()):
            _probe(each)
        self._unmount_unused(self._idle_s)

    def _unmount_unused(self, idle_s: float) -> None:
        for each in list(self._known.values()):
            try:
                if each.unmount_unused(idle_s):
                    _LOG.info("%s is unmounted: no process uses it", each.export.source)
            except (WorkerError, OSError) as error:
                _LOG.warning("%s stays mounted: %s", each.export.source, error)


def _probe(mounted: Mounted) -> None:
    """Probe a mount, and log changes of its state. A hung store blocks this thread until the probe's deadline."""
    before = mounted.health.read().breaker
    try:
        mounted.refresh_health()
    except (WorkerError, OSError) as error:
        if before.state == CLOSED:
            _LOG.error("%s", error)
        return
    if before.state != CLOSED:
        _LOG.warning("%s answers again", mounted.export.source)
