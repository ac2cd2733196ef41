"""The ledger: who must do what, who is doing it, and how it went. It is the truth; Celery's messages are doorbells."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import redis

from ssvm_worker.errors import Cancelled, InvalidRequest, ObjectNotFound, ResourceBusy, StoreUnavailable, WorkerError

from . import scripts
from .connection import connect, translated
from .record import (
    CANCELLED,
    ENDED,
    FAILED,
    QUEUED,
    RUNNING,
    STATES,
    SUCCEEDED,
    Claim,
    Hold,
    NewJob,
    Record,
    WorkerLost,
    from_hash,
)

#: Seconds after a doorbell before the reaper looks whether it was heard.
RING_AGAIN_S = 5.0
#: Seconds that a job waits for a resource which another one holds.
BUSY_S = 3.0
#: Records read in one go.
_BATCH = 200


class Ledger:
    """The records of all jobs behind one broker.

    Safe to share between threads. Every method raises StoreUnavailable while the broker is away, and nothing was
    changed then, or the change may be repeated.
    """

    def __init__(self, url: str, *, prefix: str = "", claim_s: float = 10.0, keep_s: float = 30 * 86400.0) -> None:
        self.claim_s = claim_s
        self._url = url
        self._celery_prefix = prefix
        self._prefix = f"{prefix}ssvm.ledger:"
        self._keep_s = keep_s
        self._redis = connect(url)
        self._scripts = {name: self._redis.register_script(text) for name, text in scripts.all_scripts().items()}

    # Submitting and looking

    def submit(self, new: NewJob) -> tuple[Record, bool]:
        """Write a job down as queued; True if it is new.

        The same id with the same request gives the job there is; with another request InvalidRequest. Safe to repeat.
        """
        record, is_new = self._write(new, QUEUED)
        if (record.job, _canonical(record.request)) != (new.job, _canonical(new.request)):
            remedy = f"Use a new job_id; `ssvm job {new.job_id}` shows the other"
            raise InvalidRequest("This job id belongs to another request", new.job_id, remedy)
        return record, is_new

    def refuse(self, new: NewJob, error: WorkerError) -> Record:
        """Write down a job that failed before it began, so that its sender finds the reason; changes no known job."""
        return self._write(new, FAILED, error)[0]

    def _write(self, new: NewJob, state: str, error: WorkerError | None = None) -> tuple[Record, bool]:
        fields = {
            "job": new.job,
            "zone": new.zone,
            "lane": new.lane,
            "request": _canonical(new.request),
            "resource": new.resource,
            "callback_url": new.callback_url or "",
            **({"traceparent": new.traceparent} if new.traceparent else {}),
        }
        flat = [part for pair in fields.items() for part in pair]
        had = self._run("SUBMIT", new.job_id, state, _error(error), RING_AGAIN_S, *flat)
        return self.get(new.job_id), not had

    def get(self, job_id: str) -> Record:
        """The record of a job; ObjectNotFound."""
        with translated(self._url):
            fields: Any = self._redis.hgetall(self._key(f"job:{job_id}"))
        if not fields:
            raise ObjectNotFound("There is no such job", job_id, "`ssvm jobs` lists them")
        return from_hash(fields)

    def page(
        self,
        state: str | None = None,
        zone: str | None = None,
        lane: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[Record]:
        """Records, the newest first, that have this state, zone and lane."""
        if state is not None and state not in STATES:
            raise InvalidRequest(f"There is no state {state!r}", "", f"There are: {', '.join(STATES)}")
        found: list[Record] = []
        for record in self._newest("jobs" if state is None else f"state:{state}"):
            if zone in (None, record.zone) and lane in (None, record.lane) and state in (None, record.state):
                found.append(record)
                if len(found) == offset + limit:
                    break
        return found[offset:]

    def _newest(self, index: str) -> Iterator[Record]:
        start = 0
        while True:
            with translated(self._url):
                ids: Any = self._redis.zrevrange(self._key(index), start, start + _BATCH - 1)
            yield from self._records(ids)
            if len(ids) < _BATCH:
                return
            start += _BATCH

    def _records(self, ids: Sequence[str]) -> Iterator[Record]:
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipe.hgetall(self._key(f"job:{job_id}"))
            rows = pipe.execute()
        return (from_hash(fields) for fields in rows if fields)

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            for state in STATES:
                pipe.zcard(self._key(f"state:{state}"))
            return dict(zip(STATES, pipe.execute(), strict=True))

    def warnings(self) -> list[str]:
        """What in the broker's own settings may lose jobs, or that it does not let us ask."""
        with translated(self._url):
            try:
                asked: Any = self._redis.info("persistence", "memory")
            except redis.ResponseError as error:
                return [f"it does not say whether it keeps jobs ({error}). Allow INFO, and set `appendonly yes`"]
        found = []
        if not asked.get("aof_enabled"):
            found.append("appendonly is off: a restart of the broker forgets jobs. Set `appendonly yes`")
        if (policy := asked.get("maxmemory_policy", "noeviction")) != "noeviction":
            found.append(f"maxmemory-policy is {policy}: jobs may be evicted. Set `noeviction`")
        return found

    # What the worker of a job does

    def claim(self, job_id: str, worker: str, held: bool = False) -> Claim | None:
        """Take the job, if it is queued, due, and nobody runs another job on its resource; None: leave it alone.

        A job that waits for its resource is rung again in a moment; that costs it no attempt.
        """
        token = self._run("CLAIM", job_id, worker, self.claim_s, BUSY_S, int(held))
        return Claim(job_id, token, self.get(job_id)) if token else None

    def beat(self, claim: Claim, progress: dict[str, Any] | None = None) -> bool:
        """Renew the claim for claim_s; True if a user wants the job cancelled.

        Raises Cancelled("fenced") if the claim is lost.
        """
        kept = json.dumps(progress) if progress else ""
        answer = self._run("BEAT", claim.job_id, claim.token, self.claim_s, kept)
        if answer < 0:
            raise Cancelled("fenced")
        return bool(answer)

    def confirm(self, claim: Claim) -> None:
        """Raise Cancelled("fenced") unless the claim is ours; then it stays so for claim_s."""
        self.beat(claim)

    def finish(
        self, claim: Claim, state: str, *, result: dict[str, Any] | None = None, error: dict[str, Any] | None = None
    ) -> None:
        """End the job; of one that has failed, *result* is what was done nevertheless.

        Raises Cancelled("fenced") if the claim is lost. Safe to repeat.
        """
        shown = json.dumps(result or {}) if result or not error else ""
        kept = json.dumps(error) if error else ""
        if not self._run("FINISH", claim.job_id, claim.token, state, shown, kept):
            raise Cancelled("fenced")

    def release(self, claim: Claim, error: dict[str, Any] | None, delay_s: float = 0.0, counted: bool = True) -> None:
        """Queue the job again, due in *delay_s*; *counted* against max_attempts. Safe to repeat.

        A job that a user has cancelled meanwhile is due at once, for its leftovers to be removed.
        Raises Cancelled("fenced") if the claim is lost.
        """
        kept = json.dumps(error) if error else ""
        if not self._run("RELEASE", claim.job_id, claim.token, kept, delay_s, int(counted)):
            raise Cancelled("fenced")

    @contextmanager
    def holding(self, new: NewJob, worker: str, part_of: str = "") -> Iterator[Hold | None]:
        """Within, the job is ours without any message: for work that must hold its resource, and is done on the spot.

        One that has failed before is tried again. None where it is not there to be had: another job holds the
        resource, or somebody runs it; what is new is cancelled then. An error ends the job as failed, a cancel as
        cancelled; should we die, the reaper gives it to a worker. *part_of*: the job among whose ``parts`` it is.
        """
        record, is_new = self.submit(new)
        if part_of:
            self._note_part(part_of, new.job_id)
        if record.state in (FAILED, CANCELLED):
            self.retry(new.job_id, worker)
        claim = self.claim(new.job_id, worker, held=True)
        if claim is None:
            if is_new:
                self.cancel(new.job_id, worker)
            yield None
            return
        hold = Hold(new.job_id, claim.token, partial(self.confirm, claim))
        try:
            with self._beating(claim, hold):
                yield hold
        except WorkerError as error:
            state = CANCELLED if isinstance(error, Cancelled) else FAILED
            with suppress(Cancelled):
                self.finish(claim, state, error=error.as_dict())
            raise
        with suppress(Cancelled):
            self.finish(claim, SUCCEEDED, result=hold.result)

    def _note_part(self, whole: str, job_id: str) -> None:
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.sadd(self._key(f"parts:{whole}"), job_id)
            pipe.expire(self._key(f"parts:{whole}"), int(self._keep_s))
            pipe.execute()

    def parts(self, job_id: str) -> Iterator[Record]:
        """The jobs that were run as parts of that one, whatever became of them, by id."""
        with translated(self._url):
            found: Any = self._redis.smembers(self._key(f"parts:{job_id}"))
        ids = sorted(found)
        for start in range(0, len(ids), _BATCH):
            yield from self._records(ids[start : start + _BATCH])

    @contextmanager
    def _beating(self, claim: Claim, hold: Hold) -> Iterator[None]:
        """Renew the claim from a thread, until it is lost."""
        over = threading.Event()

        def beat() -> None:
            try:
                while not over.wait(self.claim_s / 4):
                    with suppress(StoreUnavailable):
                        hold.cancelled = self.beat(claim)
            except Cancelled:
                hold.fenced = True

        thread = threading.Thread(target=beat, name="holding", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # What a user does

    def retry(self, job_id: str, by: str) -> Record:
        """Queue a failed or cancelled job again; its attempts are kept, and its doorbell is the caller's to ring."""
        state = self._run("RETRY", job_id, by)
        if state in (FAILED, CANCELLED):
            return self.get(job_id)
        self.get(job_id)
        if state == RUNNING:
            raise ResourceBusy("The job is running", job_id, f"Wait for its end, or `ssvm cancel {job_id}` first")
        remedy = "Nothing to do" if state == QUEUED else "Submit it under a new job_id to do it once more"
        raise InvalidRequest(f"The job is {state}; only failed and cancelled ones are retried", job_id, remedy)

    def cancel(self, job_id: str, by: str) -> Record:
        """Cancel a queued job, or ask the worker of a running one to stop and clean up.

        A queued job that ran before is first taken by a worker, which removes what its attempts have left.
        """
        state = self._run("CANCEL", job_id, by)
        record = self.get(job_id)
        if state in ENDED:
            raise InvalidRequest(f"The job has ended already: it is {state}", job_id, "There is nothing to cancel")
        return record

    # What keeps it going

    def rung(self, job_id: str) -> None:
        """Note that the doorbell was sent."""
        self._run("RUNG", job_id, RING_AGAIN_S)

    def reap(self, every_s: float, max_attempts: int, stands: Callable[[str], bool] | None = None) -> list[Record]:
        """One round: jobs of lost workers are queued again; returns those whose doorbell the caller must ring.

        Any number may call it, as often as they like: one in *every_s* acts. After a time without any round, which
        means that the broker was away, running jobs are spared for one claim's time, so that the living renew first.
        A job that lost max_attempts workers gets one more only to remove its leftovers.

        *stands* says whether messages stand in that queue, where they go another way than through this broker.
        """
        lost = _error(
            WorkerLost("The worker died or was cut off", "", "The job goes on elsewhere; see that worker's log")
        )
        given = (self.claim_s, every_s, max_attempts, RING_AGAIN_S, lost, self._celery_prefix)
        ids, unsure = self._run("REAP", *given, "1" if stands else "")
        asked = (self.get(job_id) for job_id in unsure)
        unheard = [each for each in asked if stands and not stands(each.queue)]
        return [self.get(job_id) for job_id in ids] + unheard

    def sparing(self) -> bool:
        """Whether running jobs are spared now, because nobody had looked for a while."""
        with translated(self._url):
            seconds, micros = self._redis.time()
            until = self._redis.hget(self._key("reaper"), "spare")
        return bool(until and float(until) > seconds + micros / 1e6)

    def expire(self) -> int:
        """Drop records that ended more than keep_s ago, a hundred at the most; returns how many."""
        return int(self._run("EXPIRE", self._keep_s))

    def expired(self) -> int:
        """How many records ``expire`` would drop, if it was called often enough."""
        with translated(self._url):
            seconds, micros = self._redis.time()
            return int(self._redis.zcount(self._key("ended"), "-inf", seconds + micros / 1e6 - self._keep_s))

    def live(self) -> set[str]:
        """The resources of queued and running jobs, which somebody writes or will, and the backups that they read."""
        # Queued ones twice, so that a job which goes back to the queue between two looks is not missed.
        states = (QUEUED, RUNNING, QUEUED)
        records = (each for state in states for each in self._newest(f"state:{state}"))
        return {what for each in records for what in (each.resource, _backup_of(each.request)) if what}

    def take_callback(self, lease_s: float, job_id: str = "") -> Record | None:
        """A job whose callback is due, or that one's if it is; nobody else gets it for *lease_s*."""
        which = self._run("TAKE_CALLBACK", job_id, lease_s)
        return self.get(which) if which else None

    def note_callback(self, job_id: str, state: str, error: str = "", delay_s: float = 0.0) -> None:
        """Write down how a try went: delivered, failed for good, or pending until *delay_s* from now."""
        self._run("CALLBACK", job_id, state, error, delay_s)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _run(self, name: str, *args: object) -> Any:
        with translated(self._url):
            return self._scripts[name](args=[self._prefix, *map(str, args)])


def _backup_of(request: dict[str, Any]) -> str:
    """The place of the backup that a job is about, whatever it does with it; "" if it is about none."""
    given = [request.get(name) for name in ("account", "volume", "id")]
    if all(given):
        return f"snapshots/{'/'.join(map(str, given))}"
    key = str(request.get("key", ""))
    return "/".join(key.split("/")[:4]) if key.startswith("snapshots/") else ""


def _canonical(request: dict[str, Any]) -> str:
    return json.dumps(request, sort_keys=True, separators=(",", ":"))


def _error(error: WorkerError | None) -> str:
    return json.dumps(error.as_dict()) if error else ""
