"""A thread that repeats one action, and survives its errors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ssvm_worker.errors import WorkerError


class PeriodicThread:
    """A thread that calls *act* every *every_s* seconds until ``stop``. An error is logged and ends only that round."""

    def __init__(self, name: str, act: Callable[[], object], every_s: float) -> None:
        """*name*: the name of the thread and, after ``ssvm.``, of its logger."""
        self._act = act
        self._every_s = every_s
        self._log = logging.getLogger(f"ssvm.{name}")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. The first round is after *every_s* seconds."""
        self._thread.start()

    def stop(self, wait_s: float = 0.0) -> None:
        """Ask the thread to end, and wait for it up to *wait_s* seconds."""
        self._over.set()
        if wait_s and self._thread.is_alive():
            self._thread.join(wait_s)

    @property
    def stopping(self) -> bool:
        """Return whether ``stop`` was called."""
        return self._over.is_set()

    def once(self) -> None:
        """Run one round in the caller's thread."""
        try:
            self._act()
        except WorkerError as error:
            self._log.warning("%s", error)
        except Exception:  # noqa: BLE001 - a dead thread would be noticed only when jobs stop
            self._log.exception("a round failed")

    def _repeat(self) -> None:
        while not self._over.wait(self._every_s):
            self.once()
