"""The ledger: the record of all jobs in Redis, and the only source of truth. A Celery message only wakes a worker."""

from __future__ import annotations

import heapq
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

from ssvm_worker.config.schema import LANES, LedgerSection
from ssvm_worker.errors import Cancelled, InvalidRequest, ObjectNotFound, ResourceBusy, WorkerError, misused

from .connection import BrokerClient, redis, translated
from .job_filter import JobFilter
from .record import (
    CANCELLED,
    ENDED,
    FAILED,
    QUEUED,
    RUNNING,
    STATES,
    Beside,
    Claim,
    ClaimedJob,
    NewJob,
    Record,
    WorkerLost,
    from_hash,
    number_of,
    place_of,
    unpack_ended,
)

#: Seconds after which the reaper sends another message for a job that could run, but that no worker takes.
_RESEND_S = 5.0
#: The shortest claim, in seconds, that ``claim_next`` gives. A busy machine needs time to start the process of a job.
_START_S = 10.0
#: Number of records that one call reads.
_BATCH = 200
#: Number of ids that the first step of a search reads. Each further step reads ten times as many.
_SEARCHED = 1000
#: Number of ids that an error about an ambiguous id names.
_NAMED = 5
#: The least number of characters that stand for a longer id.
_MIN_GIVEN = 4


class Ledger(BrokerClient):
    """The records of all jobs of one broker.

    Safe to share between threads. Every method raises StoreUnavailable while the broker is away. The method has then
    changed nothing, or the caller may repeat it.
    """

    _NAME = "ssvm.ledger:"
    _SCRIPTS = (
        *("submit", "claim", "claim_next", "begin", "beat", "finish", "release", "retry", "cancel"),
        *("take_callback", "note_callback", "reap", "refuse_queued", "expire", "records", "newest"),
    )

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "",
        claim_s: float = LedgerSection().claim_s,
        keep_s: float = LedgerSection().keep_days * 86400.0,
        limits: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """*limits*: how many jobs that use the same store, source or account may run at once. 0 means no limit."""
        self.claim_s = claim_s
        self._limits = [limits.get(kind, 0) for kind in ("store", "source", "account")]
        self._host = socket.gethostname()
        self._celery_prefix = prefix
        self._keep_s = keep_s
        super().__init__(url, prefix=prefix)

    # Submit and read jobs

    def submit(self, new: NewJob) -> tuple[Record, bool]:
        """Store a job as queued. Return its record, and True if the job is new.

        A known id with the same request returns the existing job. A known id with another request raises
        InvalidRequest. Safe to repeat.
        """
        ((record, is_new),) = self.submit_or_find([(new, None)])
        if (record.job, _dump(record.request, sort_keys=True)) != (new.job, _dump(new.request, sort_keys=True)):
            remedy = f"Use a new job_id; `ssvm job {new.job_id}` shows the other"
            raise InvalidRequest("This job id belongs to another request", new.job_id, remedy)
        return record, is_new

    def submit_or_find(self, jobs: Sequence[tuple[NewJob, Beside | None]]) -> list[tuple[Record, bool]]:
        """Store jobs as queued, and beside each one a value. Return their records, and True for each new job.

        A known id returns the existing job, also with another request. Then nothing changes. Several jobs are one
        request to the broker. An error may leave some of them stored. Safe to repeat.
        """
        given = [_submission(new, QUEUED, beside=beside) for new, beside in jobs]
        answers = [self._run("submit", *given[0])] if len(given) == 1 else self._run_all("submit", given)
        records = []
        for each, (created, *found) in zip(given, answers, strict=True):
            fields = found or each[6:]
            stored = dict(zip(fields[::2], fields[1::2], strict=True))
            if not found:
                stored |= {"job_id": each[0], "state": QUEUED, "created": created, "updated": created}
            records.append((from_hash(stored), not found))
        return records

    def refuse(self, new: NewJob, error: WorkerError) -> Record:
        """Store a job as failed before its first attempt, so that its sender finds the reason.

        An existing job does not change.
        """
        self._run("submit", *_submission(new, FAILED, error=error))
        return self.get(new.job_id)

    def get(self, job_id: str) -> Record:
        """Return the record of a job. Raise ObjectNotFound if the job is unknown."""
        for record in self._records([job_id]):
            return record
        raise ObjectNotFound("There is no such job", job_id, "`ssvm jobs` lists them")

    def page(
        self,
        state: str | None = None,
        zone: str | None = None,
        lane: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[Record]:
        """Return the records with this state, zone and lane, newest first."""
        if state is not None and state not in STATES:
            raise InvalidRequest(f"There is no state {state!r}", "", f"There are: {', '.join(STATES)}")
        ids = self._newest((state,) if state else STATES, zone, lane, offset + limit)
        return [record for record in self._records(ids[offset:]) if state in (None, record.state)]

    def find(self, wanted: JobFilter) -> Iterator[Record]:
        """Yield the records that the filter wants, newest first. A job that changes meanwhile may be missing."""
        seen: set[str] = set()
        limit = _SEARCHED
        while True:
            ids = self._newest(wanted.states, wanted.zone, wanted.lane, limit)
            yield from filter(wanted.matches, self._records([each for each in ids if each not in seen]))
            if len(ids) < limit:
                return
            seen.update(ids)
            limit *= 10

    def find_id(self, given: str) -> str:
        """Return the id of the job whose id is *given*, or of the only job whose id begins with it.

        Raise ObjectNotFound if there is none, and InvalidRequest if there are several or the beginning is short. A
        short beginning may mean another job tomorrow.
        """
        if any(self._records([given])):
            return given
        if len(given) < _MIN_GIVEN:
            what = f"No job has this id, and the beginning of an id needs {_MIN_GIVEN} characters"
            raise misused(InvalidRequest(what, given, "Give more characters. `ssvm jobs` lists the jobs"))
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", given) + "*"
        found: set[str] = set()
        with translated(self._url):
            counters: Any = self._redis.hkeys(f"{self._key}counts")
            for name in counters:
                found |= {job_id for job_id, _ in self._redis.zscan_iter(f"{self._key}in:{name}", pattern, _SEARCHED)}
        if not found:
            raise ObjectNotFound("There is no such job", given, "`ssvm jobs` lists them")
        if len(found) > 1:
            shown = ", ".join(sorted(found)[:_NAMED]) + (" and others" if len(found) > _NAMED else "")
            what = f"{len(found)} jobs have ids that begin so: {shown}"
            raise misused(InvalidRequest(what, given, "Give more characters"))
        return found.pop()

    def _newest(
        self, states: Sequence[str], zone: str | None = None, lane: str | None = None, limit: int | None = None
    ) -> list[str]:
        """Return the ids of jobs in these states, newest first, at most *limit*."""
        with translated(self._url):
            counters: Any = self._redis.hkeys(f"{self._key}counts")
        places = {place_of(name)[1:] for name in counters}
        wanted = [each for each in places if zone in (None, each[0]) and lane in (None, each[1])]
        indexes = [f"in:{state} {its_zone} {its_lane}" for its_zone, its_lane in wanted for state in states]
        rows = self._run("newest", limit - 1 if limit else -1, *indexes)
        found = [[(row[at], float(row[at + 1])) for at in range(0, len(row), 2)] for row in rows]
        newest = heapq.merge(*found, key=lambda each: each[::-1], reverse=True)
        return [job_id for job_id, _ in islice(newest, limit)]

    def _records(self, ids: Sequence[str]) -> Iterator[Record]:
        """Yield the records of these jobs, in batches. Unknown jobs are skipped."""
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            rows = self._run("records", *batch)
            for job_id, flat, packed in zip(batch, rows[::2], rows[1::2], strict=True):
                if flat:
                    yield from_hash(dict(zip(flat[::2], flat[1::2], strict=True)))
                elif packed:
                    yield from_hash(unpack_ended(job_id, packed))

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by state."""
        with translated(self._url):
            counters: Any = self._redis.hgetall(f"{self._key}counts")
        found = dict.fromkeys(STATES, 0)
        for name, number in counters.items():
            state = place_of(name)[0]
            found[state] = found.get(state, 0) + (number_of(number) or 0)
        return found

    def warnings(self) -> list[str]:
        """Return warnings about settings of the broker that may lose jobs, or about an INFO that it refuses."""
        with translated(self._url):
            try:
                info: Any = self._redis.info("persistence", "memory")
            except redis.ResponseError as error:
                return [f"the broker refuses INFO, so its settings are unknown ({error}). Allow INFO to the worker"]
        found = []
        if not info.get("aof_enabled"):
            found.append("appendonly is off: a restart of the broker forgets jobs. Set `appendonly yes`")
        if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
            found.append(f"maxmemory-policy is {policy}: jobs may be evicted. Set `noeviction`")
        return found

    def clock_difference(self) -> float:
        """Return by how many seconds the broker's clock differs from that of this host, without the way there."""
        before = time.time()
        broker = self._now()
        return max(0.0, before - broker, broker - time.time())

    # For the worker of a job

    def claim(self, job_id: str, worker: str, held: bool = False) -> Claim | None:
        """Claim a job if it is queued and due, and none of its limits is exhausted. Otherwise return None.

        A job waits if a limit is exhausted or another job holds its resource. Its wait costs no attempt. When the
        limit has a free slot again, ``finish``, ``release`` or ``reap`` returns the id of the waiting job.
        *held* marks a job that runs inside another job or a command.
        """
        taken = self._run("claim", job_id, worker, self._host, self.claim_s, *self._limits, "1" if held else "")
        return self.begin(job_id, taken[1]) if taken else None

    def claim_next(self, zone: str, lane: str, worker: str) -> ClaimedJob | None:
        """Claim the next job of a lane, in the order of lua/include/queues.lua. Return None if no job can run.

        The process that runs the job must call ``begin``.
        """
        claim_s = max(self.claim_s, _START_S)
        while taken := self._run("claim_next", f"{zone} {lane}", worker, self._host, claim_s, *self._limits):
            if taken[0]:
                return ClaimedJob(*taken)
        return None

    def begin(self, job_id: str, token: int) -> Claim | None:
        """Return the claim of a job that ``claim_next`` gave to this worker, or None if the claim is lost.

        If no process calls this method, the claim expires and the job is queued again. This does not count as an
        attempt.
        """
        flat = self._run("begin", job_id, token, self.claim_s)
        return Claim(job_id, token, from_hash(dict(zip(flat[::2], flat[1::2], strict=True)))) if flat else None

    def beat(self, claim: Claim, progress: dict[str, Any] | None = None) -> bool:
        """Renew the claim for claim_s seconds. Return True if a user has cancelled the job.

        Raise Cancelled("fenced") if the claim is lost.
        """
        answer = self._run("beat", claim.job_id, claim.token, self.claim_s, _json(progress))
        if answer < 0:
            raise Cancelled("fenced")
        return bool(answer)

    def confirm(self, claim: Claim) -> None:
        """Raise Cancelled("fenced") if the claim is lost. Otherwise renew it for claim_s seconds."""
        self.beat(claim)

    def finish(
        self,
        claim: Claim,
        state: str,
        *,
        result: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
        progress: dict[str, Any] | None = None,
    ) -> list[str]:
        """End the job. The *result* of a failed job is the work that it did before the error.

        Return the ids of jobs that waited for this one. The caller should send their messages. Otherwise the reaper
        does. Raise Cancelled("fenced") if the claim is lost. Safe to repeat.
        """
        shown = _dump(result or {}) if result or not error else ""
        return self._end_attempt("finish", claim, state, shown, _json(error), _json(progress))

    def release(
        self,
        claim: Claim,
        error: dict[str, Any] | None,
        delay_s: float = 0.0,
        counted: bool = True,
        progress: dict[str, Any] | None = None,
    ) -> list[str]:
        """Queue the job again, due in *delay_s* seconds. *counted*: the attempt counts against max_attempts.

        If a user has cancelled the job, it is due at once, so that a worker removes its leftovers. The result and
        the errors are those of ``finish``. Safe to repeat.
        """
        return self._end_attempt("release", claim, _json(error), delay_s, int(counted), _json(progress))

    def _end_attempt(self, script: str, claim: Claim, *args: object) -> list[str]:
        to_wake: list[str] | None = self._run(script, claim.job_id, claim.token, *args)
        if to_wake is None:
            raise Cancelled("fenced")
        return to_wake

    def note_part(self, parent_job_id: str, job_id: str) -> None:
        """Store that the job runs as a part of another job."""
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.sadd(f"{self._key}parts:{parent_job_id}", job_id)
            pipe.expire(f"{self._key}parts:{parent_job_id}", int(self._keep_s))
            pipe.execute()

    def parts(self, job_id: str) -> Iterator[Record]:
        """Yield the jobs that ran as parts of that job, in any state, by id."""
        with translated(self._url):
            found: Any = self._redis.smembers(f"{self._key}parts:{job_id}")
        yield from self._records(sorted(found))

    # For users

    def retry(self, job_id: str, by: str) -> Record:
        """Queue a failed or cancelled job again, and keep its attempts. The caller should send its message."""
        state = self._run("retry", job_id, by)
        if state in (FAILED, CANCELLED):
            return self.get(job_id)
        self.get(job_id)
        if state == RUNNING:
            raise ResourceBusy("The job is running", job_id, f"Wait for its end, or `ssvm cancel {job_id}` first")
        remedy = "Nothing to do" if state == QUEUED else "Submit it under a new job_id to do it once more"
        raise InvalidRequest(
            f"The state of the job is {state}; only failed and cancelled jobs are retried", job_id, remedy
        )

    def cancel(self, job_id: str, by: str) -> Record:
        """Cancel a queued job, or ask the worker of a running job to stop and clean up.

        If a queued job has earlier attempts, a worker first removes what they left.
        """
        state = self._run("cancel", job_id, by)
        record = self.get(job_id)
        if state in ENDED:
            what = f"The job has ended already. Its state is {state}"
            raise InvalidRequest(what, job_id, "There is nothing to cancel")
        return record

    # For the reaper, clean-up and callbacks

    def reap(self, every_s: float, max_attempts: int, has_message: Callable[[str], bool] | None = None) -> list[Record]:
        """Run one round of the reaper: queue the jobs of lost workers again. Return the jobs that need a message.

        - Any number of callers may call this method at any rate. One call in *every_s* seconds acts.
        - If no round ran for a while, the broker was away. Then running jobs are spared for the time of one claim,
          so that their workers renew first.
        - A job that lost max_attempts workers gets one more, only to remove its leftovers.
        - A queue with a message needs no other: the worker that receives the message takes the next job.
          *has_message* checks a queue where messages use another broker.
        """
        lost = WorkerLost(
            "The worker died or was cut off", "", "Another worker runs the job. See the lost worker's log"
        )
        other_broker = "1" if has_message else ""
        args = (self.claim_s, every_s, max_attempts, _RESEND_S, _json(lost.as_dict()), self._celery_prefix)
        to_wake, to_check = self._run("reap", *args, other_broker, *self._limits)
        candidates = self._records(to_check)
        without_message = [record for record in candidates if has_message and not has_message(record.queue)]
        return [*self._records(to_wake), *without_message]

    def zones(self, *states: str) -> set[str]:
        """Return the zones that have jobs in these states, apart from lanes that no worker takes."""
        with translated(self._url):
            counters: Any = self._redis.hgetall(f"{self._key}counts")
        places = (place_of(name) for name, number in counters.items() if number_of(number))
        return {zone for state, zone, lane in places if state in states and lane in LANES}

    def refuse_queued(self, job_id: str, error: WorkerError) -> bool:
        """End a queued job without attempts as failed. Return False for any other job."""
        return bool(self._run("refuse_queued", job_id, _json(error.as_dict())))

    def sparing(self) -> bool:
        """Return whether ``reap`` spares running jobs now, because no round ran for a while."""
        with translated(self._url):
            until: Any = self._redis.hget(f"{self._key}reaper", "spare")
        try:
            return float(until or 0) > self._now()
        except ValueError:  # not a time of the ledger
            return False

    def expire(self) -> int:
        """Delete records that ended more than keep_s seconds ago, at most 100. Return their number."""
        return int(self._run("expire", self._keep_s))

    def expired(self) -> int:
        """Return the number of records that repeated calls of ``expire`` would delete."""
        until = self._now() - self._keep_s
        with translated(self._url):
            return int(self._redis.zcount(f"{self._key}ended", "-inf", until))

    def live(self) -> set[str]:
        """Return the resources of queued and running jobs, and the backups that these jobs read.

        Clean-up must not touch them.
        """
        # Queued jobs are read twice: a running job may return to the queue between two reads.
        states = (QUEUED, RUNNING, QUEUED)
        records = (record for state in states for record in self._records(self._newest([state])))
        return {name for each in records for name in (each.resource, _backup_of(each.request)) if name}

    def due_callbacks(self, limit: int, offset: int = 0) -> dict[str, str]:
        """Return the URLs of due callbacks by job id, oldest first, without a lease.

        A job whose record was deleted by hand has the URL "".
        """
        until = self._now()
        with translated(self._url):
            ids: Any = self._redis.zrangebyscore(f"{self._key}callbacks", "-inf", until, start=offset, num=limit)
        urls = {record.job_id: record.callback.url for record in self._records(ids)}
        return {job_id: urls.get(job_id, "") for job_id in ids}

    def take_callback(self, lease_s: float, job_id: str = "") -> Record | None:
        """Lease a due callback for *lease_s* seconds: that of *job_id*, or any. Return its job, or None."""
        taken = self._run("take_callback", job_id, lease_s)
        return self.get(taken) if taken else None

    def note_callback(self, job_id: str, state: str, error: str = "", delay_s: float = 0.0) -> None:
        """Store the outcome of a try: delivered, failed for good, or pending for *delay_s* seconds."""
        self._run("note_callback", job_id, state, error, delay_s)

    def _now(self) -> float:
        """Return the broker's time, in seconds since the epoch."""
        with translated(self._url):
            seconds, micros = self._redis.time()
        return float(seconds + micros / 1e6)


def _backup_of(request: dict[str, Any]) -> str:
    """Return the prefix of the backup that a request names, or "" if it names none."""
    given = [request.get(name) for name in ("account", "volume", "id")]
    if all(given):
        return f"snapshots/{'/'.join(map(str, given))}"
    key = str(request.get("key", ""))
    return "/".join(key.split("/")[:4]) if key.startswith("snapshots/") else ""


def _submission(
    new: NewJob, state: str, *, error: WorkerError | None = None, beside: Beside | None = None
) -> tuple[str, ...]:
    """Return the arguments of lua/submit.lua."""
    fields = {
        "job": new.job,
        "zone": new.zone,
        "lane": new.lane,
        "request": _dump(new.request, sort_keys=True),
        "resource": new.resource,
        "callback_url": new.callback_url,
        "priority": new.priority,
        "account": new.account,
        "uses": "\n".join(new.uses),
        "traceparent": new.traceparent,
    }
    flat = (str(part) for pair in fields.items() if pair[1] for part in pair)
    given = (beside.key, beside.value, str(beside.seconds)) if beside else ("", "", "")
    return (new.job_id, state, _json(error.as_dict() if error else None), *given, *flat)


def _json(value: dict[str, Any] | None) -> str:
    return _dump(value) if value else ""


def _dump(value: dict[str, Any], *, sort_keys: bool = False) -> str:
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"))
