"""Semaphores that all workers of a broker share. A slot of a dead worker expires after *claim_s*.

``<prefix>ssvm.slots:<name>`` is a sorted set of holders by the time at which their slots expire, on the broker's clock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ssvm_worker.config.schema import LedgerSection
from ssvm_worker.errors import StoreUnavailable, WorkerError
from ssvm_worker.ledger.connection import BrokerClient, translated

_log = logging.getLogger("ssvm.slots")

#: Seconds between two tries.
_AGAIN_S = 1.0


class SharedSlots(BrokerClient):
    """``slots.Slots`` of one broker. Safe to share between threads. Connects when a slot is first needed.

    While the broker is away, no worker gets a slot, and holders keep theirs. *claim_s*: seconds after which a slot
    that its worker does not renew is free.
    """

    _NAME = "ssvm.slots:"
    _SCRIPTS = ("slot_take", "slot_renew", "slot_release")

    def __init__(self, url: str, *, prefix: str = "", claim_s: float = LedgerSection().claim_s) -> None:
        super().__init__(url, prefix=prefix)
        self._claim_s = claim_s

    @contextmanager
    def hold(self, name: str, limit: int, wait: Callable[[float], None]) -> Iterator[None]:
        key, holder = self._key + name, uuid.uuid4().hex
        logged = False
        while not self._ask("slot_take", key, holder, self._claim_s, limit):
            if not logged:
                _log.info("waiting for a slot: %s has %d, and all are held, or the broker is away", name, limit)
            logged = True
            wait(_AGAIN_S)
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(self._claim_s / 4):
                with contextlib.suppress(WorkerError):  # the next renewal may succeed, and the thread must not end
                    self._ask("slot_renew", key, holder, self._claim_s)

        renewer = threading.Thread(target=renew, name="slot", daemon=True)
        renewer.start()
        try:
            yield
        finally:
            stop.set()
            renewer.join()
            with contextlib.suppress(WorkerError):  # the slot expires
                self._ask("slot_release", key, holder)

    def _ask(self, script: str, *args: Any) -> bool:
        """Return the answer of a script; False while the broker is away."""
        with contextlib.suppress(StoreUnavailable), translated(self._url):
            return bool(self._scripts[script](args=list(args)))
        return False
