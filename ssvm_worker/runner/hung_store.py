"""Frees a pool process whose job hangs in a store that does not answer: else such jobs would soon hold all of them.

A call to a hard mount cannot be interrupted, only killed with its process; and some not even then, until they are made
to fail. The job goes back to the queue, without an attempt counted, and goes on where it was when the store is back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import StoreAway, WorkerError
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Claim
from ssvm_worker.ledger.retry_policy import RetryPolicy, decide
from ssvm_worker.stores.nfs.mount import ask_to_die, used_and_away

from .heartbeat import ClaimHeartbeat
from .periodic import PeriodicThread

_LOG = logging.getLogger("ssvm.stuck")
_EVERY_S = 1.0
#: Seconds to wait for a look that is under way when the job ends.
_JOIN_S = 10.0
#: Seconds that a job which was told to stop gets to do so, though its store is away.
_TOLD_S = 5.0


class HungStoreWatchdog:
    """Tells when a job has hung for so long; by looks at the clock that its caller has made."""

    def __init__(self, give_up_s: float) -> None:
        self._give_up_s = give_up_s
        self._since: float | None = None
        self._seen: object = None

    def hangs(self, now: float, away: object, progress: object, told: bool) -> bool:
        """Whether it is to be given up: its store away all the while, nothing moved, and no end in sight."""
        if not away or progress != self._seen:
            self._since, self._seen = None, progress
        if not away:
            return False
        if self._since is None:
            self._since = now
        return now - self._since >= (min(_TOLD_S, self._give_up_s) if told else self._give_up_s)


@contextlib.contextmanager
def freeing(settings: Settings, ledger: Ledger, claim: Claim, heart: ClaimHeartbeat) -> Iterator[None]:
    """While the job runs, kill this process if it hangs in a store for ``nfs.give_up_s``."""
    if not any(each.url.startswith("nfs://") for each in settings.stores.values()):
        yield
        return

    def give_up(error: StoreAway) -> None:
        _LOG.critical("job %s hangs in its store; its process is killed, the job waits: %s", claim.job_id, error)
        decision = decide(error, 1, RetryPolicy())
        with contextlib.suppress(WorkerError):  # its claim runs out, at the latest
            ledger.release(claim, error.as_dict(), decision.delay_s, decision.counted)
        ask_to_die()
        os.kill(os.getpid(), signal.SIGKILL)

    watch = HungStoreWatchdog(settings.nfs.give_up_s)

    def look() -> None:
        away = used_and_away()
        if watch.hangs(time.monotonic(), away, heart.progress, heart.told) and away and not rounds.stopping:
            give_up(away)

    rounds = PeriodicThread("stuck", look, _EVERY_S)
    rounds.start()
    try:
        yield
    finally:
        rounds.stop(_JOIN_S)
