"""The heartbeat of a running job: renew its claim, store its progress, and receive requests to stop."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from ssvm_worker.errors import Cancelled, StoreUnavailable, WorkerError
from ssvm_worker.jobs.attempt import NO_STAGE, Progress
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Claim

from .periodic import PeriodicThread

_LOG = logging.getLogger("ssvm.heartbeat")
#: The longest time between two heartbeats, in seconds. A cancel must reach a transfer within two.
_EVERY_S = 1.0
#: Seconds for which a job continues without the broker. If the broker is down, no other worker can take the job.
#: If only this worker is cut off, another one can, but this one commits nothing without a confirmed claim.
_AWAY_S = 120.0
#: Seconds between two tries of a call that must reach the broker.
_AGAIN_S = 0.5


class ClaimHeartbeat:
    """A thread that renews a claim while the block runs. The job asks ``confirm`` before it commits."""

    def __init__(self, ledger: Ledger, claim: Claim) -> None:
        self._ledger = ledger
        self._claim = claim
        #: The progress of the attempt, which each heartbeat stores.
        self.followed: Progress | None = None
        #: Whether the claim is lost for good.
        self.fenced = False
        self._last = time.monotonic()
        self._away = False
        self._cancel = claim.record.cancel_requested
        self._shutdown = False
        self._lock = threading.Lock()
        self._rounds = PeriodicThread("heartbeat", self._beat, min(_EVERY_S, ledger.claim_s / 4))

    @property
    def progress(self) -> dict[str, Any] | None:
        """Return the snapshot that a heartbeat stores now, or None before the first stage."""
        followed = self.followed
        return followed.snapshot() if followed and followed.stage != NO_STAGE else None

    def shut_down(self) -> None:
        """Make the job stop for a shutdown. Safe in a signal handler."""
        self._shutdown = True

    def stop_reason(self) -> str | None:
        """Return the reason why the job must stop, or None.

        If the process was frozen for longer than its claim, this method checks the claim first. So the job moves no
        byte without a claim.
        """
        if time.monotonic() - self._last > self._ledger.claim_s and not self._away:
            self._beat()
        if self.fenced:
            return "fenced"
        if self._shutdown:
            return "shutdown"
        return "user" if self._cancel else None

    def confirm(self) -> None:
        """Return if the claim is valid now. Raise Cancelled if the job must stop. Wait while the broker is away."""
        while True:
            self._beat()
            if reason := self.stop_reason():
                raise Cancelled(reason)
            if not self._away:
                return
            time.sleep(_AGAIN_S)

    def owns(self) -> bool:
        """Return whether the claim is valid now, even if the job must stop. Wait while the broker is away."""
        self._beat()
        while self._away and not self.fenced:
            time.sleep(_AGAIN_S)
            self._beat()
        return not self.fenced

    @property
    def stop_requested(self) -> bool:
        """Return whether the job must stop, as far as this process knows. Does not ask the broker."""
        return self.fenced or self._shutdown or self._cancel

    def _beat(self) -> None:
        with self._lock:
            try:
                self._cancel = self._ledger.beat(self._claim, self.progress) or self._cancel
                self._last, self._away = time.monotonic(), False
            except Cancelled:
                self.fenced = True
            except WorkerError as error:
                limit_s = max(_AWAY_S, self._ledger.claim_s)
                if not self._away:
                    text = "job %s continues without its ledger for up to %.0f s: %s"
                    _LOG.warning(text, self._claim.job_id, limit_s, error)
                self._away = True
                if time.monotonic() - self._last > limit_s:
                    self.fenced = True

    def __enter__(self) -> ClaimHeartbeat:
        self._rounds.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._rounds.stop(10.0)


def wait_for_broker(act: Any, heartbeat: ClaimHeartbeat | None = None) -> Any:
    """Return the result of *act*. Repeat the call while the broker is away, but no longer than the claim can last."""
    while True:
        try:
            return act()
        except StoreUnavailable as error:
            if heartbeat is not None and heartbeat.fenced:
                raise Cancelled("fenced") from error
            _LOG.warning("waiting for the broker: %s", error)
            time.sleep(_AGAIN_S)
