"""The beat of one running job: renews its claim, carries its progress, and hears that it must stop."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from ssvm_worker.errors import Cancelled, StoreUnavailable, WorkerError
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Claim

from .periodic import PeriodicThread

_LOG = logging.getLogger("ssvm.heart")
#: Seconds between two beats, at the most: a cancel must reach a transfer within two.
_EVERY_S = 1.0
#: Seconds for which a transfer goes on without the broker. Nobody can take it over meanwhile if the broker is down;
#: if only we are cut off, somebody can, but we commit nothing unconfirmed.
_AWAY_S = 120.0
#: Seconds between two tries of something that must get through.
_AGAIN_S = 0.5


class ClaimHeartbeat:
    """A thread that beats for as long as the context lasts. The owner of the claim asks it before it commits."""

    def __init__(self, ledger: Ledger, claim: Claim) -> None:
        self._ledger = ledger
        self._claim = claim
        self._every_s = min(_EVERY_S, ledger.claim_s / 4)
        self._progress: dict[str, Any] | None = None
        self._last = time.monotonic()
        self._away = False
        self._fenced = False
        self._cancel = claim.record.cancel_requested
        self._shutdown = False
        self._lock = threading.Lock()
        self._rounds = PeriodicThread("heart", self._beat, self._every_s)

    def note(self, progress: dict[str, Any]) -> None:
        """Keep what the next beat shall carry."""
        self._progress = progress

    def shut_down(self) -> None:
        """Make the job stop for a shutdown; safe to call in a signal handler."""
        self._shutdown = True

    def stop_reason(self) -> str | None:
        """Why the job must stop, or None.

        A process that was frozen for longer than its claim finds out here, before it moves another byte.
        """
        if self._stale and not self._away:
            self._beat()
        if self._fenced:
            return "fenced"
        if self._shutdown:
            return "shutdown"
        return "user" if self._cancel else None

    def confirm(self) -> None:
        """Return if the claim stands now, waiting for a broker that is away; raises Cancelled if the job must stop."""
        while True:
            self._beat()
            if reason := self.stop_reason():
                raise Cancelled(reason)
            if not self._away:
                return
            time.sleep(_AGAIN_S)

    def owns(self) -> bool:
        """Whether the claim stands now, even if the job must stop; waits for a broker that is away."""
        self._beat()
        while self._away and not self._fenced:
            time.sleep(_AGAIN_S)
            self._beat()
        return not self._fenced

    @property
    def progress(self) -> dict[str, Any] | None:
        """What was noted last."""
        return self._progress

    @property
    def told(self) -> bool:
        """Whether the job was told to stop, as far as is known; asks nobody."""
        return self._fenced or self._shutdown or self._cancel

    @property
    def fenced(self) -> bool:
        """Whether the claim is lost for good."""
        return self._fenced

    @property
    def _stale(self) -> bool:
        return time.monotonic() - self._last > self._ledger.claim_s

    def _beat(self) -> None:
        with self._lock:
            try:
                self._cancel = self._ledger.beat(self._claim, self._progress) or self._cancel
                self._last, self._away = time.monotonic(), False
            except Cancelled:
                self._fenced = True
            except WorkerError as error:
                self._miss(error)

    def _miss(self, error: WorkerError) -> None:
        if not self._away:
            _LOG.warning("job %s goes on without its ledger: %s", self._claim.job_id, error)
        self._away = True
        if time.monotonic() - self._last > max(_AWAY_S, self._ledger.claim_s):
            self._fenced = True

    def __enter__(self) -> ClaimHeartbeat:
        self._rounds.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._rounds.stop(10.0)


def insist(act: Any, heart: ClaimHeartbeat | None = None) -> Any:
    """Do *act*, again and again while the broker is away, but not longer than the claim can be ours."""
    while True:
        try:
            return act()
        except StoreUnavailable as error:
            if heart is not None and heart.fenced:
                raise Cancelled("fenced") from error
            _LOG.warning("waiting for the broker: %s", error)
            time.sleep(_AGAIN_S)
