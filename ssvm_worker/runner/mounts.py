"""Looks at this host's mounts, and unmounts what its workers have mounted and no longer use."""

from __future__ import annotations

import atexit
import logging
import time

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.operations.mounts import nfs_mounts
from ssvm_worker.stores.nfs.circuit_breaker import CLOSED
from ssvm_worker.stores.nfs.mount import Mounted

from .periodic import PeriodicThread

_LOG = logging.getLogger("ssvm.mounts")
#: Seconds between two looks for processes that hang and want to be let die.
_OFTEN_S = 1.0


class MountKeeper:
    """A thread of the worker's main process, which uses no mount itself; without stores on NFS it has nothing to do."""

    def __init__(self, settings: Settings) -> None:
        self._idle_s = settings.nfs.idle_s
        self._every_s = min(settings.nfs.probe_every_s, settings.nfs.idle_s)
        self._mounts = nfs_mounts(settings)
        self._due = time.monotonic() + self._every_s
        self._rounds = PeriodicThread("mounts", self._round, min(_OFTEN_S, self._every_s))

    def start(self) -> None:
        """Begin. The last look is when the process ends: its jobs may run on for a while after the stop."""
        if self._mounts:
            self._rounds.start()
            atexit.register(self._unmount, 0.0)

    def stop(self) -> None:
        """Tell the thread to end."""
        self._rounds.stop()

    def _round(self) -> None:
        for each in self._mounts:
            _let_the_dying_die(each)
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._every_s
        for each in self._mounts:
            _look(each)
        self._unmount(self._idle_s)

    def _unmount(self, idle_s: float) -> None:
        for each in self._mounts:
            _unmount_unused(each, idle_s)


def _let_the_dying_die(mounted: Mounted) -> None:
    """Here, as this process has no file open on a mount."""
    try:
        mounted.let_the_dying_die()
    except (WorkerError, OSError) as error:
        _LOG.error("a process that hangs cannot be ended: %s", error)


def _look(mounted: Mounted) -> None:
    """A store that hangs holds up this thread for the probe's deadline, and nothing else."""
    was = mounted.health.read().breaker
    try:
        mounted.look()
    except (WorkerError, OSError) as error:
        if was.state == CLOSED:
            _LOG.error("%s", error)
        return
    if was.state != CLOSED:
        _LOG.warning("%s answers again", mounted.export.source)


def _unmount_unused(mounted: Mounted, idle_s: float) -> None:
    try:
        if mounted.unmount_unused(idle_s):
            _LOG.info("%s is unmounted: nobody uses it", mounted.export.source)
    except (WorkerError, OSError) as error:
        _LOG.warning("%s stays mounted: %s", mounted.export.source, error)
