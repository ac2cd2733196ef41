"""One upload on its way to the stores: a download job of the ledger whose source is whoever sends.

Its record stands in lane ``inbound``. Running: somebody sends, and this process holds the claim. Queued: it waits for
its sender, and what has come lies in a part. So nothing else writes the artifact, clean-up spares it, and jobs, events
and callbacks tell of it as of any other.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import read_draft
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, ResourceBusy, StoreUnavailable, WorkerError
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.download.store_image import settled_in
from ssvm_worker.jobs.request import fingerprint
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.link_expiry import cancelled, end_links
from ssvm_worker.ledger.links import Link
from ssvm_worker.ledger.record import INBOUND, Claim
from ssvm_worker.ledger.retry_policy import RetryDecision
from ssvm_worker.operations.traces import tracing
from ssvm_worker.runner.heartbeat import ClaimHeartbeat
from ssvm_worker.runner.run import JobRun, worker_name
from ssvm_worker.wiring.assembly import Stores, new_job, open_links

from .push_source import Sender, SenderDoors, SentVersion

_LOG = logging.getLogger("ssvm.serve")
#: Attempts of one link: so many without a pause, and so many in all.
_FREE_ATTEMPTS, _MOST_ATTEMPTS = 5, 50
_LONGEST_PAUSE_S = 120


@dataclass
class _Upload(JobRun):
    """An attempt, of which the sender alone can make another one."""

    sender: Sender

    @cached_property
    def _attempt(self) -> Attempt:
        attempt = super()._attempt
        attempt.doors = SenderDoors(attempt.doors, self.sender)
        attempt.limits = replace(attempt.limits, resumes=0)
        return attempt

    def _will_resume(self, error: BaseException) -> bool:
        return self.sender.resumable and super()._will_resume(error)

    def _decide(self, error: BaseException) -> RetryDecision:
        if isinstance(error, WorkerError) and error.retryable:
            return RetryDecision("queued", counted=False)
        return super()._decide(error)

    def reset(self) -> None:
        """Remove what has come, and wait for the sender again."""
        self._discard()
        self.ledger.release(self.claim, None, counted=False)


@dataclass(frozen=True)
class Inbox:
    """Begins, looks at and ends uploads. Every method blocks, and raises StoreUnavailable while the ledger is away."""

    settings: Settings
    ledger: Ledger

    def state(self, link: Link) -> str:
        """Of the job behind the link; "" while nobody has sent anything."""
        try:
            return self.ledger.get(link.job_id).state
        except ObjectNotFound:
            return ""

    def wait_s(self, link: Link) -> int:
        """Seconds until the link may begin another attempt; InvalidRequest if it has had too many.

        The first tries follow at once; then each must wait twice as long as the one before.
        """
        try:
            record = self.ledger.get(link.job_id)
        except ObjectNotFound:
            return 0
        number = record.attempted
        if number >= _MOST_ATTEMPTS:
            raise InvalidRequest(f"The upload was tried {number} times", link.key, "Ask for a new link")
        if number <= _FREE_ATTEMPTS:
            return 0
        pause = min(1 << (number - _FREE_ATTEMPTS), _LONGEST_PAUSE_S)
        return max(0, min(pause, math.ceil(record.attempts[-1].ended + pause - time.time())))

    def claim(self, link: Link) -> Claim:
        """The right to send; ResourceBusy while somebody does, or writes the artifact in another way.

        InvalidRequest when the link has been used. A failed upload is tried again.
        """
        new = new_job(self.settings, JOBS["download"], link.request, default_id=link.job_id)
        record, _ = self.ledger.submit(replace(new, lane=INBOUND))
        if record.state in ("succeeded", "cancelled"):
            raise InvalidRequest(f"The upload has {record.state}", link.key, "Ask for a new link to send another")
        if record.state == "failed":
            self.ledger.retry(link.job_id, "its sender")
        claim = self.ledger.claim(link.job_id, worker_name())
        if claim is None:
            raise ResourceBusy("Somebody else sends this now, or writes it", link.key, "Wait until that has ended")
        return claim

    def run(self, claim: Claim, sender: Sender) -> None:
        """Store what the sender gives; the job's error."""
        try:
            figures: dict[str, Any] = {"job_id": claim.job_id, "lane": INBOUND, "attempt": claim.number}
            with ClaimHeartbeat(self.ledger, claim) as heart, tracing("download", **figures) as trace:
                outcome = _Upload(self.settings, self.ledger, claim, heart, sender, trace=trace).run()
        finally:
            sender.finish()
        record = self.ledger.get(claim.job_id)
        if outcome["state"] == "fenced":
            raise StoreUnavailable("The ledger lost sight of this upload", claim.job_id, "Ask where to go on")
        if record.state != "succeeded":
            raise Ended.of(record.error)

    def stored(self, link: Link, length: int) -> int:
        """From which byte on the sender of a file of that length shall go on."""
        store, artifact = Stores(self.settings)[link.store], Artifact.of_prefix(link.key)
        draft = read_draft(store, artifact) if store.resumable else None
        version = {"link": link.id, "length": length}
        origin = {"fingerprint": fingerprint(link.request["url"]), "validator": version}
        if draft is None or {name: draft.source.get(name) for name in origin} != origin:
            return 0
        key = artifact.key(draft.facts["name"])
        left = sum(each.size for each in store.leftovers(artifact.prefix) if each.key == key)
        return min(left, settled_in(draft))

    def reset(self, link: Link) -> None:
        """Remove what has come; the link is good for another try. ResourceBusy while somebody sends."""
        store, artifact = Stores(self.settings)[link.store], Artifact.of_prefix(link.key)
        if self.state(link) not in ("queued", "failed", "running") or read_draft(store, artifact) is None:
            return  # nobody goes on from what there may be
        claim = self.claim(link)
        with ClaimHeartbeat(self.ledger, claim) as heart:
            _Upload(self.settings, self.ledger, claim, heart, Sender(link.path, None)).reset()

    def forget(self, link: Link) -> None:
        """The link ends, and with it what has come."""
        open_links(self.settings).revoke(link)
        self.end(link.id)

    def end(self, link_id: str) -> None:
        """End the job of a link that is no longer good, and remove what has come; who is sending is heard out."""
        if claim := cancelled(self.ledger, link_id):
            with ClaimHeartbeat(self.ledger, claim) as heart:
                _Upload(self.settings, self.ledger, claim, heart, Sender(claim.job_id, None)).run()

    def end_links(self) -> None:
        """Forget links that have ended, and what came by them and is not whole."""
        end_links(self.ledger, open_links(self.settings), self.end)


class Ended(WorkerError):
    """How the job ended, as the ledger has it."""

    def __init__(self, what: str, where: str = "", remedy: str = "", kind: str = "") -> None:
        super().__init__(what, where, remedy)
        self.args = (what, where, remedy, kind)
        self.kind = kind

    @classmethod
    def of(cls, error: dict[str, object] | None) -> Ended:
        """The error object of the record."""
        given = error or {"error": "Cancelled", "what": "The upload was cancelled"}
        what, where, remedy, kind = (str(given.get(each, "")) for each in ("what", "where", "remedy", "error"))
        return cls(what, where, remedy, kind)

    def as_dict(self) -> dict[str, object]:
        """With the class that the job raised."""
        return super().as_dict() | {"error": self.kind}


def sender_of(link: Link, length: int | None, offset: int = 0, *, resumable: bool = False) -> Sender:
    """The source of an upload that comes by a link."""
    version = SentVersion(link.id, length) if resumable and length is not None else None
    return Sender(f"upload:{PurePosixPath(link.key).name}", length, offset, version)
