"""Work that must hold its resource like a job, and is done on the spot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from ssvm_worker.errors import Cancelled, StoreUnavailable, WorkerError

from .ledger import Ledger
from .record import CANCELLED, FAILED, SUCCEEDED, Claim, InlineClaim, NewJob


@contextmanager
def holding(ledger: Ledger, new: NewJob, worker: str, part_of: str = "") -> Iterator[InlineClaim | None]:
    """Within, the job is ours without any message.

    One that has failed before is tried again. None where it is not there to be had: another job holds the
    resource, or somebody runs it; what is new is cancelled then. Any error ends the job as failed, a cancel as
    cancelled; should we die, the reaper gives it to a worker. *part_of*: the job among whose ``parts`` it is.
    Other limits than the resource do not count: the job that does it has its slots already.
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
    hold = InlineClaim(new.job_id, claim.token, partial(ledger.confirm, claim))
    try:
        with _beating(ledger, claim, hold):
            yield hold
    except Exception as error:
        state = CANCELLED if isinstance(error, Cancelled) else FAILED
        known = error if isinstance(error, WorkerError) else WorkerError(f"A bug: {type(error).__name__}: {error}")
        with suppress(Cancelled, StoreUnavailable):  # the reaper sees to what the ledger cannot be told now
            ledger.finish(claim, state, error=known.as_dict())
        raise
    with suppress(Cancelled):
        ledger.finish(claim, SUCCEEDED, result=hold.result)


@contextmanager
def _beating(ledger: Ledger, claim: Claim, hold: InlineClaim) -> Iterator[None]:
    """Renew the claim from a thread, until it is lost."""
    over = threading.Event()

    def beat() -> None:
        try:
            while not over.wait(ledger.claim_s / 4):
                with suppress(StoreUnavailable):
                    hold.cancelled = ledger.beat(claim)
        except Cancelled:
            hold.fenced = True

    thread = threading.Thread(target=beat, name="holding", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
