"""Run a job: claim it, run it, and store its outcome.

Only this module decides what an error means for the job:

- The claim is lost (fenced): another worker has the job, and this attempt ends without a result.
- The error is retryable, or a shutdown: the job is queued again.
- The user cancelled: leftovers are removed, and the job is cancelled.
- Any other error: leftovers are removed, the job fails, and the error is raised.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import Cancelled, StoreUnavailable, WorkerError
from ssvm_worker.jobs import Job, find_job
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import JobRequest, parse_request
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Claim, Record
from ssvm_worker.ledger.retry_policy import RetryDecision, decide, decide_patiently
from ssvm_worker.operations import logs
from ssvm_worker.operations.traces import UNTRACED, Trace, tracing
from ssvm_worker.wiring.assembly import kept_ledger, make_attempt, open_services
from ssvm_worker.wiring.celery_sender import send_wakeup
from ssvm_worker.wiring.server_names import with_server_names

from .heartbeat import ClaimHeartbeat, wait_for_broker
from .hung_store import kill_if_hung
from .messages import Message, accept
from .replication import order_copies
from .snapshot_removal import order_removal

_LOG = logging.getLogger("ssvm.runner")
#: Seconds that a job has to stop after a request to stop. Then the call in which it hangs is interrupted.
_GENTLE_S = 5.0


def run_job(settings: Settings, message: Message) -> dict[str, Any]:
    """Run the job of a message, if it can run now. Return the outcome that Celery's log shows.

    Raise the error of a failed job, so that Celery shows the task as failed too.
    """
    logs.begin(message.job_id)
    ledger = kept_ledger(settings)
    job_id, claim = wait_for_broker(lambda: _claimed(ledger, settings, message))
    if claim is None:
        _LOG.info("job %s skipped: it cannot run now", job_id)
        return {"job_id": job_id, "state": "left"}
    record = claim.record
    logs.begin(record.job_id, claim.number)
    settings, problem = _with_server_names(settings, record)
    attributes = {"job_id": record.job_id, "zone": record.zone, "lane": record.lane, "attempt": claim.number}
    with (
        ClaimHeartbeat(ledger, claim) as heartbeat,
        draining(heartbeat.shut_down, settings.worker.drain_s),
        kill_if_hung(settings, ledger, claim, heartbeat),
        tracing(record.job, record.traceparent, **attributes) as trace,
    ):
        return JobRun(settings, ledger, claim, heartbeat, trace=trace, problem=problem).run()


def _with_server_names(settings: Settings, record: Record) -> tuple[Settings, WorkerError | None]:
    """Return the settings with the names of a management server, or the error with which the attempt must fail."""
    try:
        return wait_for_broker(lambda: with_server_names(settings, record.job, record.job_id, record.request)), None
    except WorkerError as error:
        return settings, error


def _claimed(ledger: Ledger, settings: Settings, message: Message) -> tuple[str, Claim | None]:
    """Return the message's job id, and its claim or None.

    The main process usually has the claim. If it could not reach the ledger, it passes on the original message.
    """
    if message.claim:
        return message.claim[0], ledger.begin(*message.claim)
    record = accept(ledger, settings, message)
    if (record.zone, record.lane) != (settings.zone, find_job(message.job).lane):  # a job of other workers
        return record.job_id, None
    return record.job_id, ledger.claim(record.job_id, message.worker or worker_name())


def worker_name() -> str:
    """Return host and process id, by which people find the process of a job."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass
class JobRun:
    """One claimed attempt."""

    settings: Settings
    ledger: Ledger
    claim: Claim
    heartbeat: ClaimHeartbeat
    trace: Trace = field(default=UNTRACED, kw_only=True)
    #: An error that was found before the attempt.
    problem: WorkerError | None = field(default=None, kw_only=True)

    def run(self) -> dict[str, Any]:
        """Run the job, and end it or queue it again in the ledger."""
        try:
            if ending := self.claim.record.ending:  # the last attempt ended the job, and may have left something
                self._discard()
                return self._end(ending, error=self.claim.record.error or _describe(Cancelled("user")))
            if self.problem:
                raise self.problem
            result = self._job.run(self._request, self._attempt)
            self._attempt.progress.publish()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the one place where any error becomes an outcome
            return self._fail(error)
        return self._end("succeeded", result=result)

    @property
    def _job(self) -> Job:
        return find_job(self.claim.record.job)

    @cached_property
    def _request(self) -> JobRequest:
        return parse_request(self._job.Request, self.claim.record.request, self._job.name)

    @cached_property
    def _attempt(self) -> Attempt:
        attempt = make_attempt(
            self.settings,
            self.claim.job_id,
            open_services(self.settings),
            number=self.claim.number,
            token=self.claim.token,
            publish=self.trace.show,
            stop_reason=self.heartbeat.stop_reason,
            confirm=self.heartbeat.confirm,
            will_resume=self._will_resume,
        )
        self.heartbeat.followed = attempt.progress
        return attempt

    def _will_resume(self, error: BaseException) -> bool:
        return _is_fenced(error) or self._decide(error).state == "queued"

    def _decide(self, error: BaseException) -> RetryDecision:
        policy = self.settings.retry
        if self.claim.record.request.get("patient"):
            return decide_patiently(_as_cancelled(error), self.claim.number, policy)
        return decide(_as_cancelled(error), self.claim.record.tries, policy)

    def _fail(self, error: BaseException) -> dict[str, Any]:
        if _is_fenced(error):
            return self._stop_fenced()
        shown = _describe(error)
        self.trace.fail(shown)
        if not isinstance(error, WorkerError | SystemExit):
            _LOG.error("job %s failed: internal error", self.claim.job_id, exc_info=error)
        decision = self._decide(error)
        if decision.state == "queued":
            delay_s, progress = decision.delay_s, self.heartbeat.progress
            try:
                release = partial(self.ledger.release, self.claim, shown, delay_s, decision.counted, progress)
                to_wake = wait_for_broker(release, self.heartbeat)
            except Cancelled:
                return self._stop_fenced()
            self.trace.note(state="queued")
            _LOG.warning("job %s is queued again, due in %.1f s: %s", self.claim.job_id, delay_s, shown["message"])
            self._send_messages(to_wake + ([] if delay_s else [self.claim.job_id]))
            return {"job_id": self.claim.job_id, "state": "queued"}
        self._discard()
        ended = self._end(decision.state, error=shown, result=getattr(error, "result", None))
        if decision.state == "failed" and ended["state"] == "failed":
            raise error
        return ended

    def _discard(self) -> None:
        """Remove leftovers. A request to stop does not prevent this; a lost claim does."""

        def confirm() -> None:
            if not self.heartbeat.owns():
                raise Cancelled("fenced")

        if not self.heartbeat.owns():
            return
        try:
            self._job.discard(self._request, replace(self._attempt, confirm=confirm, stop_reason=lambda: None))
        except WorkerError as error:
            _LOG.warning("job %s: leftovers remain until the next clean-up: %s", self.claim.job_id, error)
        except Exception:  # noqa: BLE001 - the job has ended anyway, and must not look as if it ran
            _LOG.exception("job %s: leftovers remain until the next clean-up", self.claim.job_id)

    def _end(self, state: str, result: dict[str, Any] | None = None, **outcome: Any) -> dict[str, Any]:
        """Store the outcome. Queue copies for stores that missed an artifact, and the removal of an open snapshot."""
        outcome |= {"result": result, "progress": self.heartbeat.progress}
        try:
            follow_ups = wait_for_broker(lambda: self._follow_ups(result if result is not None else {}), self.heartbeat)
            to_wake = wait_for_broker(lambda: self.ledger.finish(self.claim, state, **outcome), self.heartbeat)
        except Cancelled:
            return self._stop_fenced()
        self.trace.note(state=state)
        _LOG.info("job %s %s", self.claim.job_id, state)
        self._send_messages(to_wake + [each.job_id for each in follow_ups])
        return {"job_id": self.claim.job_id, "state": state}

    def _follow_ups(self, result: dict[str, Any]) -> list[Record]:
        """Queue the jobs that do what this one has left. Safe to repeat."""
        copies = order_copies(self.settings, self.ledger, self.claim.record, result)
        if self.claim.record.job != "backup":
            return copies
        snapshots = open_services(self.settings).open_snapshots
        return copies + order_removal(self.settings, self.ledger, self.claim, snapshots, result)

    def _send_messages(self, job_ids: list[str]) -> None:
        """Send messages for jobs that may run now. While the broker is away, this is left to the reaper."""
        with suppress(StoreUnavailable):
            for job_id in job_ids:
                send_wakeup(self.settings, self.ledger.get(job_id))

    def _stop_fenced(self) -> dict[str, Any]:
        self.trace.note(state="fenced")
        _LOG.warning("job %s belongs to another worker now; this attempt has ended", self.claim.job_id)
        return {"job_id": self.claim.job_id, "state": "fenced"}


def _is_fenced(error: BaseException) -> bool:
    return isinstance(error, Cancelled) and error.reason == "fenced"


def _as_cancelled(error: BaseException) -> BaseException:
    """Return SystemExit as a shutdown: a job that hangs while its worker ends is queued again."""
    return Cancelled("shutdown") if isinstance(error, SystemExit) else error


def _describe(error: BaseException) -> dict[str, Any]:
    """Return the error object of the record."""
    error = _as_cancelled(error)
    if isinstance(error, WorkerError):
        return error.as_dict()
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"Internal error: {type(error).__name__}: {error}"
    return {
        "error": type(error).__name__,
        "what": what,
        "where": f"{os.path.basename(place.filename)}:{place.lineno}",
        "remedy": "Report it with the worker's log",
        "retryable": False,
        "message": what,
    }


@contextmanager
def draining(stop: Callable[[], None], drain_s: float) -> Iterator[None]:
    """Handle termination signals while a job runs in the block.

    The first signal lets the job run for *drain_s* seconds more. Then *stop* is called, and later SystemExit is
    raised. Each further signal starts the next step at once.

    Celery's own handler raises SystemExit at any line. Its soft shutdown always sleeps the full time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    steps = 0

    def on_signal(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            signal.setitimer(signal.ITIMER_REAL, drain_s)
        elif steps == 2:
            stop()
            signal.setitimer(signal.ITIMER_REAL, _GENTLE_S)
        else:
            raise SystemExit("the job did not stop in time")

    # The signal that a worker sends to its pool processes when it ends: see REMAP_SIGTERM in Celery's manual.
    term_signal = signal.Signals[os.environ.get("REMAP_SIGTERM") or "SIGTERM"]
    previous = {each: signal.signal(each, on_signal) for each in (term_signal, signal.SIGALRM)}
    try:
        yield
    finally:
        if steps:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in previous.items():
            signal.signal(each, handler)
