"""Remove expired links, and end the uploads that wait for more data through them."""

from __future__ import annotations

from collections.abc import Callable

from ssvm_worker.errors import Cancelled, InvalidRequest, ObjectNotFound

from .ledger import Ledger
from .links import PUT, job_of, link_of
from .links.redis import LinkBook
from .record import INBOUND, Claim

_BY = "its link has ended"
#: The largest number of uploads that one call examines.
_MAX_UPLOADS = 10_000


def end_links(ledger: Ledger, book: LinkBook, end: Callable[[str], None] | None = None) -> int:
    """Remove all links that expired or were revoked. Return their number.

    A link stays while a client sends through it. *end* ends the upload of a link, by the link's id. Without *end*,
    the job is cancelled, and the received data stays until the sweep.
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
    """Cancel queued uploads whose link was removed, for example after a user's retry. Return their number.

    Reads every queued upload.
    """
    waiting = [link_of(each.job_id) for each in ledger.page("queued", lane=INBOUND, limit=_MAX_UPLOADS)]
    strays = [each for each in waiting if not book.find(each)]
    for link_id in strays:
        _cancel(ledger, link_id)
    return len(strays)


def cancelled(ledger: Ledger, link_id: str) -> Claim | None:
    """Cancel a link's upload. Return a claim if the caller must remove received data, else None."""
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
