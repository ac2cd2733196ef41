"""From a doorbell to a job that has run: claim or leave, run, and write down what came of it.

The only place that decides what an error means for the job as a whole.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import Cancelled, StoreUnavailable, WorkerError
from ssvm_worker.jobs import Job, find_job
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import JobRequest, parse_request
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Claim
from ssvm_worker.ledger.retry_policy import RetryDecision, RetryPolicy, decide, decide_patiently
from ssvm_worker.operations import logs
from ssvm_worker.operations.traces import UNTRACED, Trace, tracing
from ssvm_worker.wiring.assembly import kept_ledger, make_attempt, open_slots
from ssvm_worker.wiring.celery_sender import ring

from .heartbeat import ClaimHeartbeat, insist
from .hung_store import freeing
from .messages import Message, accept
from .replication import order_copies
from .shutdown import draining

_LOG = logging.getLogger("ssvm.bridge")


def run_job(settings: Settings, message: Message) -> dict[str, Any]:
    """Run the job that the message is about, if it is there to be run; returns what Celery's log shows.

    Raises the error of a job that has failed, so that Celery shows it as failed too.
    """
    logs.begin(message.job_id)
    ledger = kept_ledger(settings)
    job_id, claim = insist(lambda: _claimed(ledger, settings, message))
    if claim is None:
        _LOG.info("job %s is left alone: it is not there to be run", job_id)
        return {"job_id": job_id, "state": "left"}
    record = claim.record
    logs.begin(record.job_id, claim.number)
    figures = {"job_id": record.job_id, "zone": record.zone, "lane": record.lane, "attempt": claim.number}
    with (
        ClaimHeartbeat(ledger, claim) as heart,
        draining(heart.shut_down, settings.worker.drain_s),
        freeing(settings, ledger, claim, heart),
        tracing(record.job, record.traceparent, **figures) as trace,
    ):
        return JobRun(settings, ledger, claim, heart, trace=trace).run()


def _claimed(ledger: Ledger, settings: Settings, message: Message) -> tuple[str, Claim | None]:
    """Mostly the main process has taken the job; without its ledger it hands over what came."""
    if message.claim:
        return message.claim[0], ledger.begin(*message.claim)
    record = accept(ledger, settings, message)
    if (record.zone, record.lane) != (settings.zone, find_job(message.job).lane):  # its own workers hear of it
        return record.job_id, None
    return record.job_id, ledger.claim(record.job_id, message.worker or worker_name())


def worker_name() -> str:
    """Who runs a job: host and process, as people find it."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass
class JobRun:
    """One claimed attempt."""

    settings: Settings
    ledger: Ledger
    claim: Claim
    heart: ClaimHeartbeat
    trace: Trace = field(default=UNTRACED, kw_only=True)

    def run(self) -> dict[str, Any]:
        """Run the job and end or release it in the ledger."""
        try:
            if self.claim.record.ending:
                return self._clean_up()
            result = self._job.run(self._request, self._attempt)
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
        return make_attempt(
            self.settings,
            self.claim.job_id,
            number=self.claim.number,
            token=self.claim.token,
            publish=self.trace.watch(self.heart.note),
            stop_reason=self.heart.stop_reason,
            confirm=self.heart.confirm,
            will_resume=self._will_resume,
            slots=open_slots(self.settings),
        )

    def _will_resume(self, error: BaseException) -> bool:
        return _is_fenced(error) or self._decide(error).state == "queued"

    def _decide(self, error: BaseException) -> RetryDecision:
        given = self.settings.retry
        policy = RetryPolicy(given.max_attempts, given.first_delay_s, given.max_delay_s)
        if self.claim.record.request.get("patient"):
            return decide_patiently(_as_cancelled(error), self.claim.number, policy)
        return decide(_as_cancelled(error), self.claim.record.tries, policy)

    def _fail(self, error: BaseException) -> dict[str, Any]:
        if _is_fenced(error):
            return self._leave()
        shown = _describe(error)
        self.trace.fail(shown)
        if not isinstance(error, WorkerError | SystemExit):
            _LOG.error("job %s met a bug of ours", self.claim.job_id, exc_info=error)
        decision = self._decide(error)
        if decision.state == "queued":
            return self._release(shown, decision)
        self._discard()
        ended = self._end(decision.state, error=shown, result=getattr(error, "result", None))
        if decision.state == "failed" and ended["state"] == "failed":
            raise error
        return ended

    def _clean_up(self) -> dict[str, Any]:
        """The attempt that follows the last one: it removes what that has left."""
        self._discard()
        record = self.claim.record
        return self._end(record.ending, error=record.error or _describe(Cancelled("user")))

    def _discard(self) -> None:
        if not self.heart.owns():
            return
        try:
            self._job.discard(self._request, replace(self._attempt, confirm=self._owned, stop_reason=lambda: None))
        except WorkerError as error:
            _LOG.warning("job %s: leftovers remain until the next clean-up: %s", self.claim.job_id, error)
        except Exception:  # noqa: BLE001 - the job has ended all the same, and must not look as if it ran
            _LOG.exception("job %s: leftovers remain until the next clean-up", self.claim.job_id)

    def _owned(self) -> None:
        """That a user wants the job to stop does not keep it from cleaning up; that it is another worker's does."""
        if not self.heart.owns():
            raise Cancelled("fenced")

    def _end(self, state: str, result: dict[str, Any] | None = None, **outcome: Any) -> dict[str, Any]:
        """Write down how it ended; what it stored, however it ended, goes to the stores that are owed it."""
        outcome |= {"result": result, "progress": self.heart.progress}
        try:
            act = partial(order_copies, self.settings, self.ledger, self.claim.record, result or {})
            copies = insist(act, self.heart)
            freed = insist(lambda: self.ledger.finish(self.claim, state, **outcome), self.heart)
        except Cancelled:
            return self._leave()
        self.trace.note(state=state)
        _LOG.info("job %s %s", self.claim.job_id, state)
        self._ring(freed + [each.job_id for each in copies])
        return {"job_id": self.claim.job_id, "state": state}

    def _release(self, shown: dict[str, Any], decision: RetryDecision) -> dict[str, Any]:
        delay_s, progress = decision.delay_s, self.heart.progress
        try:
            act = partial(self.ledger.release, self.claim, shown, delay_s, decision.counted, progress)
            freed = insist(act, self.heart)
        except Cancelled:
            return self._leave()
        self.trace.note(state="queued")
        _LOG.warning("job %s is queued again, due in %.1f s: %s", self.claim.job_id, delay_s, shown["message"])
        self._ring(freed + ([] if delay_s else [self.claim.job_id]))
        return {"job_id": self.claim.job_id, "state": "queued"}

    def _ring(self, job_ids: list[str]) -> None:
        """For jobs that may run now; if the broker has just gone away, the reaper does it."""
        with suppress(StoreUnavailable):
            for job_id in job_ids:
                ring(self.settings, self.ledger.get(job_id))

    def _leave(self) -> dict[str, Any]:
        self.trace.note(state="fenced")
        _LOG.warning("job %s belongs to another worker now; this attempt has ended", self.claim.job_id)
        return {"job_id": self.claim.job_id, "state": "fenced"}


def _is_fenced(error: BaseException) -> bool:
    return isinstance(error, Cancelled) and error.reason == "fenced"


def _as_cancelled(error: BaseException) -> BaseException:
    """A worker that is told to exit while its job is stuck: the job is handed over like any other."""
    return Cancelled("shutdown") if isinstance(error, SystemExit) else error


def _describe(error: BaseException) -> dict[str, Any]:
    """The error object of the record."""
    error = _as_cancelled(error)
    if isinstance(error, WorkerError):
        return error.as_dict()
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"A bug of ours: {type(error).__name__}: {error}"
    return {
        "error": type(error).__name__,
        "what": what,
        "where": f"{os.path.basename(place.filename)}:{place.lineno}",
        "remedy": "Report it with the worker's log",
        "retryable": False,
        "message": what,
    }
