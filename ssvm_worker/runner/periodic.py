"""A thread of a worker that does one thing again and again, and goes on whatever comes of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ssvm_worker.errors import WorkerError


class PeriodicThread:
    """Calls *act* every *every_s* seconds until it is stopped; an error costs that round alone."""

    def __init__(self, name: str, act: Callable[[], object], every_s: float) -> None:
        """*name*: of the thread and, behind ``ssvm.``, of its log."""
        self._act = act
        self._every_s = every_s
        self._log = logging.getLogger(f"ssvm.{name}")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name=name, daemon=True)

    def start(self) -> None:
        """Begin, with a pause first."""
        self._thread.start()

    def stop(self, wait_s: float = 0.0) -> None:
        """Tell the thread to end, and wait for it for so long."""
        self._over.set()
        if wait_s and self._thread.is_alive():
            self._thread.join(wait_s)

    @property
    def stopping(self) -> bool:
        """Whether it was told to end."""
        return self._over.is_set()

    def once(self) -> None:
        """One round, in the thread of the caller."""
        try:
            self._act()
        except WorkerError as error:
            self._log.warning("%s", error)
        except Exception:  # noqa: BLE001 - a thread that ends is missed by nobody until jobs stand still
            self._log.exception("a round failed")

    def _repeat(self) -> None:
        while not self._over.wait(self._every_s):
            self.once()
