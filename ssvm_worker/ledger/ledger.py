"""The ledger: who must do what, who is doing it, and how it went. It is the truth; Celery's messages are doorbells."""

from __future__ import annotations

import heapq
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

import redis

from ssvm_worker.errors import Cancelled, InvalidRequest, ObjectNotFound, ResourceBusy, WorkerError

from . import scripts
from .connection import connect, translated
from .record import (
    CANCELLED,
    ENDED,
    FAILED,
    QUEUED,
    RUNNING,
    STATES,
    Claim,
    ClaimedJob,
    NewJob,
    Record,
    WorkerLost,
    from_hash,
    place_of,
    unpacked,
)

#: Seconds after which the reaper wonders why nobody takes a job that may run.
RING_AGAIN_S = 5.0
#: Seconds that a process may take to begin with what was claimed for it, at least: a busy machine is slow to fork.
_HANDED_S = 10.0
#: Records read in one go.
_BATCH = 200


class Ledger:
    """The records of all jobs behind one broker.

    Safe to share between threads. Every method raises StoreUnavailable while the broker is away, and nothing was
    changed then, or the change may be repeated.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "",
        claim_s: float = 10.0,
        keep_s: float = 30 * 86400.0,
        limits: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """*limits*: how many jobs that use the same store, source or account may run at once; 0 for any number."""
        self.claim_s = claim_s
        self._limits = [limits.get(kind, 0) for kind in ("store", "source", "account")]
        self._host = socket.gethostname()
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
            "callback_url": new.callback_url,
            "priority": new.priority,
            "account": new.account,
            "uses": "\n".join(new.uses),
            "traceparent": new.traceparent,
        }
        flat = [str(part) for pair in fields.items() if pair[1] for part in pair]
        created = self._run("SUBMIT", new.job_id, state, _error(error), *flat)
        if not created or error:
            return self.get(new.job_id), bool(created)
        ours = dict(zip(flat[::2], flat[1::2], strict=True))
        return from_hash(ours | {"job_id": new.job_id, "state": state, "created": created, "updated": created}), True

    def get(self, job_id: str) -> Record:
        """The record of a job; ObjectNotFound."""
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
        """Records, the newest first, that have this state, zone and lane."""
        if state is not None and state not in STATES:
            raise InvalidRequest(f"There is no state {state!r}", "", f"There are: {', '.join(STATES)}")
        ids = self._newest((state,) if state else STATES, zone, lane, offset + limit)
        return [each for each in self._all_records(ids[offset:]) if state in (None, each.state)]

    def _newest(
        self, states: Sequence[str], zone: str | None = None, lane: str | None = None, most: int | None = None
    ) -> list[str]:
        """The ids of such jobs, the newest first: so many at the most."""
        with translated(self._url):
            counted: Any = self._redis.hkeys(self._key("counts"))
        places = {place_of(name)[1:] for name in counted}
        wanted = [each for each in places if zone in (None, each[0]) and lane in (None, each[1])]
        indexes = [f"in:{state} {its_zone} {its_lane}" for its_zone, its_lane in wanted for state in states]
        # In one step, as a job moves from one index to another.
        flat = self._run("NEWEST", most - 1 if most else -1, *indexes)
        found = [[(each[at], float(each[at + 1])) for at in range(0, len(each), 2)] for each in flat]
        newest = heapq.merge(*found, key=lambda each: each[::-1], reverse=True)
        return [job_id for job_id, _ in islice(newest, most)]

    def _all_records(self, ids: Sequence[str]) -> Iterator[Record]:
        for start in range(0, len(ids), _BATCH):
            yield from self._records(ids[start : start + _BATCH])

    def _records(self, ids: Sequence[str]) -> Iterator[Record]:
        rows = self._run("RECORDS", *ids)  # in one step, as a job may end between two
        for job_id, flat, text in zip(ids, rows[::2], rows[1::2], strict=True):
            if flat or text:
                yield from_hash(dict(zip(flat[::2], flat[1::2], strict=True)) if flat else unpacked(job_id, text))

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with translated(self._url):
            counted: Any = self._redis.hgetall(self._key("counts"))
        found = dict.fromkeys(STATES, 0)
        for name, number in counted.items():
            state = place_of(name)[0]
            found[state] = found.get(state, 0) + int(number)
        return found

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
        """Take that job, if it is queued and due, and no limit stands against it; None: leave it alone.

        A job that waits for a limit, or for another that writes the same thing, is rung again when that lets it go;
        it costs it no attempt.
        """
        taken = self._run("CLAIM", job_id, worker, self._host, self.claim_s, *self._limits, "1" if held else "")
        return self.begin(job_id, taken[1]) if taken else None

    def claim_next(self, zone: str, lane: str, worker: str) -> ClaimedJob | None:
        """Take the job of that lane that is next, for ``begin`` to go on with; None if there is none to be run now.

        The order: ledger/queueing.py.
        """
        claim_s = max(self.claim_s, _HANDED_S)
        while taken := self._run("NEXT", f"{zone} {lane}", worker, self._host, claim_s, *self._limits):
            if taken[0]:
                return ClaimedJob(*taken)
        return None

    def begin(self, job_id: str, token: int) -> Claim | None:
        """The claim of a job that ``claim_next`` has taken for us; None if it is lost.

        A job with which nobody begins is queued again when its claim has run out, and that costs it no attempt.
        """
        flat = self._run("BEGIN", job_id, token, self.claim_s)
        return Claim(job_id, token, from_hash(dict(zip(flat[::2], flat[1::2], strict=True)))) if flat else None

    def beat(self, claim: Claim, progress: dict[str, Any] | None = None) -> bool:
        """Renew the claim for claim_s; True if a user wants the job cancelled.

        Raises Cancelled("fenced") if the claim is lost.
        """
        answer = self._run("BEAT", claim.job_id, claim.token, self.claim_s, _json(progress))
        if answer < 0:
            raise Cancelled("fenced")
        return bool(answer)

    def confirm(self, claim: Claim) -> None:
        """Raise Cancelled("fenced") unless the claim is ours; then it stays so for claim_s."""
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
        """End the job; of one that has failed, *result* is what was done nevertheless.

        Returns the ids of those that waited for it, whose doorbells are the caller's to ring, or the reaper's.

        Raises Cancelled("fenced") if the claim is lost. Safe to repeat.
        """
        shown = _compact(result or {}) if result or not error else ""
        return _freed(self._run("FINISH", claim.job_id, claim.token, state, shown, _json(error), _json(progress)))

    def release(
        self,
        claim: Claim,
        error: dict[str, Any] | None,
        delay_s: float = 0.0,
        counted: bool = True,
        progress: dict[str, Any] | None = None,
    ) -> list[str]:
        """Queue the job again, due in *delay_s*; *counted* against max_attempts. Returns as finish; safe to repeat.

        A job that a user has cancelled meanwhile is due at once, for its leftovers to be removed.
        Raises Cancelled("fenced") if the claim is lost.
        """
        given = (_json(error), delay_s, int(counted), _json(progress))
        return _freed(self._run("RELEASE", claim.job_id, claim.token, *given))

    def note_part(self, whole: str, job_id: str) -> None:
        """Write down that the job is run as a part of another."""
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.sadd(self._key(f"parts:{whole}"), job_id)
            pipe.expire(self._key(f"parts:{whole}"), int(self._keep_s))
            pipe.execute()

    def parts(self, job_id: str) -> Iterator[Record]:
        """The jobs that were run as parts of that one, whatever became of them, by id."""
        with translated(self._url):
            found: Any = self._redis.smembers(self._key(f"parts:{job_id}"))
        yield from self._all_records(sorted(found))

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

    def reap(self, every_s: float, max_attempts: int, stands: Callable[[str], bool] | None = None) -> list[Record]:
        """One round: jobs of lost workers are queued again; returns those whose doorbell the caller must ring.

        Any number may call it, as often as they like: one in *every_s* acts. After a time without any round, which
        means that the broker was away, running jobs are spared for one claim's time, so that the living renew first.
        A job that lost max_attempts workers gets one more only to remove its leftovers.

        As long as messages stand in a queue nothing is rung there: whoever takes one takes the next job, so that no
        job needs one of its own. *stands* says whether any do, where they go another way than through this broker.
        """
        lost = _error(
            WorkerLost("The worker died or was cut off", "", "The job goes on elsewhere; see that worker's log")
        )
        given = (self.claim_s, every_s, max_attempts, RING_AGAIN_S, lost, self._celery_prefix, "1" if stands else "")
        ids, unsure = self._run("REAP", *given, *self._limits)
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
        records = (each for state in states for each in self._all_records(self._newest([state])))
        return {what for each in records for what in (each.resource, _backup_of(each.request)) if what}

    def due_callbacks(self, limit: int, offset: int = 0) -> dict[str, str]:
        """The URLs of callbacks that are due, by job, those that wait for longest first; takes none of them.

        A job whose record was deleted by hand has the URL "".
        """
        with translated(self._url):
            seconds, micros = self._redis.time()
            until = seconds + micros / 1e6
            ids: Any = self._redis.zrangebyscore(self._key("callbacks"), "-inf", until, start=offset, num=limit)
        urls = {record.job_id: record.callback.url for record in self._all_records(ids)}
        return {job_id: urls.get(job_id, "") for job_id in ids}

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
    return _json(error.as_dict() if error else None)


def _json(value: dict[str, Any] | None) -> str:
    return _compact(value) if value else ""


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _freed(answer: list[str] | None) -> list[str]:
    if answer is None:
        raise Cancelled("fenced")
    return answer
