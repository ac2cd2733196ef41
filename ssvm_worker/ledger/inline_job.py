"""Run a job in the caller's process, under the lock of its resource, without a message."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from ssvm_worker.errors import Cancelled, WorkerError

from .ledger import Ledger
from .record import CANCELLED, FAILED, SUCCEEDED, Claim, InlineClaim, NewJob


@contextmanager
def claim_inline(ledger: Ledger, new: NewJob, worker: str, part_of: str = "") -> Iterator[InlineClaim | None]:
    """Hold a job's claim while the block runs, and end the job after the block.

    - A job that failed before is tried again.
    - Yields None if another job holds the resource, or another process runs this job. A new job is then cancelled.
    - An error of the block ends the job as failed. Cancelled ends it as cancelled.
    - If this process dies, the reaper gives the job to a worker.
    - *part_of*: the id of the job that lists this one in its ``parts``.
    - Only the resource limits the job. The job that calls this function already holds its other slots.
    """
    record, is_new = ledger.submit(replace(new, uses=()))
    if part_of:
        ledger.note_part(part_of, new.job_id)
    if record.state in (FAILED, CANCELLED):
        ledger.retry(new.job_id, worker)
    claim = ledger.claim(new.job_id, worker, held=True)
    if claim is None:
        if is_new:
            ledger.cancel(new.job_id, worker)
        yield None
        return
    inline = InlineClaim(new.job_id, claim.token, partial(ledger.confirm, claim))
    try:
        with _renewed(ledger, claim, inline):
            yield inline
    except Exception as error:
        state = CANCELLED if isinstance(error, Cancelled) else FAILED
        known = error if isinstance(error, WorkerError) else WorkerError(f"A bug: {type(error).__name__}: {error}")
        with suppress(WorkerError):  # the claim expires, and the reaper acts
            ledger.finish(claim, state, error=known.as_dict())
        raise
    with suppress(Cancelled):
        ledger.finish(claim, SUCCEEDED, result=inline.result)


@contextmanager
def _renewed(ledger: Ledger, claim: Claim, inline: InlineClaim) -> Iterator[None]:
    """Renew the claim in a thread while the block runs, until the claim is lost."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(ledger.claim_s / 4) and not inline.fenced:
            try:
                inline.cancelled = ledger.beat(claim)
            except Cancelled:
                inline.fenced = True
            except WorkerError:
                continue  # the next renewal may succeed, and the thread must not end

    thread = threading.Thread(target=beat, name="inline-job", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
