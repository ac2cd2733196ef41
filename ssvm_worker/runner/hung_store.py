"""Kill a pool process whose job hangs in a store that does not answer. Such jobs would soon occupy all processes.

A call to a hard mount cannot be interrupted. It ends with its process, and sometimes only after the pending requests
of the mount are aborted. The job is queued again, and the attempt does not count. It resumes when the store answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator

from ssvm_worker.config.schema import RetrySection, Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Claim
from ssvm_worker.ledger.retry_policy import decide
from ssvm_worker.stores.nfs.mount import mark_for_abort, unavailable_export

from .heartbeat import ClaimHeartbeat
from .periodic import PeriodicThread

_LOG = logging.getLogger("ssvm.hung_store")
_EVERY_S = 1.0
#: Seconds to wait at the end of a job for a check that still runs.
_JOIN_S = 10.0
#: Seconds that a job has to stop after a request to stop, although its store is away.
_STOP_S = 5.0


class HungStoreWatchdog:
    """Decides whether a job hangs. The caller passes the current time, so this class uses no clock."""

    def __init__(self, give_up_s: float) -> None:
        self._give_up_s = give_up_s
        self._since: float | None = None
        self._progress: object = None

    def hangs(self, now: float, away: object, progress: object, stop_requested: bool) -> bool:
        """Return whether the job hangs: its store is away, and its progress has not changed for too long.

        *stop_requested*: the job was asked to stop, so it has less time.
        """
        if not away or progress != self._progress:
            self._since, self._progress = None, progress
        if not away:
            return False
        if self._since is None:
            self._since = now
        return now - self._since >= (min(_STOP_S, self._give_up_s) if stop_requested else self._give_up_s)


@contextlib.contextmanager
def kill_if_hung(settings: Settings, ledger: Ledger, claim: Claim, heartbeat: ClaimHeartbeat) -> Iterator[None]:
    """Kill this process if the job of the block hangs in a store for ``nfs.give_up_s`` seconds."""
    if not any(each.url.startswith("nfs://") for each in settings.stores.values()):
        yield
        return
    watchdog = HungStoreWatchdog(settings.nfs.give_up_s)

    def check() -> None:
        away = unavailable_export()
        # The rate also changes while nothing moves.
        moved = {name: each for name, each in (heartbeat.progress or {}).items() if name != "rate"}
        if not watchdog.hangs(time.monotonic(), away, moved, heartbeat.stop_requested) or not away:
            return
        if rounds.stopping:
            return
        _LOG.critical("job %s hangs in its store; its process is killed, the job waits: %s", claim.job_id, away)
        decision = decide(away, 1, RetrySection())
        with contextlib.suppress(WorkerError):  # otherwise the claim expires
            ledger.release(claim, away.as_dict(), decision.delay_s, decision.counted)
        mark_for_abort()
        os.kill(os.getpid(), signal.SIGKILL)

    rounds = PeriodicThread("hung_store", check, _EVERY_S)
    rounds.start()
    try:
        yield
    finally:
        rounds.stop(_JOIN_S)
