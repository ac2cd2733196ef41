"""The end of links, and of the uploads that wait by them for more: a link that is gone brings nothing any more."""

from __future__ import annotations

from collections.abc import Callable

from ssvm_worker.errors import Cancelled, InvalidRequest, ObjectNotFound

from .ledger import Ledger
from .links import PUT, job_of, link_of
from .links.redis import LinkBook
from .record import INBOUND, Claim

_BY = "its link has ended"
#: Uploads that are looked at in one go.
_MOST = 10_000


def end_links(ledger: Ledger, book: LinkBook, end: Callable[[str], None] | None = None) -> int:
    """Forget all links that have ended; returns how many. *end* ends the upload of a link, by its id.

    Without it the job is cancelled, and what has come stays for the sweep. While somebody sends, a link is kept.
    """
    count = 0
    for verb, link_id in book.gone():
        if verb == PUT and _is_running(ledger, link_id):
            continue
        if verb == PUT:
            (end or (lambda each: _cancel(ledger, each)))(link_id)
        book.forget(verb, link_id)
        count += 1
    return count


def end_strays(ledger: Ledger, book: LinkBook) -> int:
    """Cancel uploads that wait though their link is forgotten, as one that somebody has retried; returns how many.

    Looks at every queued job.
    """
    waiting = [link_of(each.job_id) for each in ledger.page("queued", lane=INBOUND, limit=_MOST)]
    strays = [each for each in waiting if not book.find(each)]
    for link_id in strays:
        _cancel(ledger, link_id)
    return len(strays)


def cancelled(ledger: Ledger, link_id: str) -> Claim | None:
    """Cancel a link's upload; a claim, if what has come must be removed and nobody is at it."""
    job_id = job_of(link_id)
    try:
        record = ledger.cancel(job_id, _BY)
    except (ObjectNotFound, InvalidRequest):
        return None
    return ledger.claim(job_id, "cleanup") if record.state == "queued" else None


def _cancel(ledger: Ledger, link_id: str) -> None:
    if claim := cancelled(ledger, link_id):
        ledger.finish(claim, "cancelled", error=Cancelled("user").as_dict())


def _is_running(ledger: Ledger, link_id: str) -> bool:
    try:
        return ledger.get(job_of(link_id)).state == "running"
    except ObjectNotFound:
        return False
