"""An upload: a download job whose source is a client that sends the image.

The record of the job is in lane ``inbound``. While a client sends, the job is running, and this process holds its
claim. While no client sends, the job is queued, and the received bytes are in a part on the store. So the job protects
its artifact like any other job: no other job writes it, clean-up spares it, and job lists, events and callbacks
include it.
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
from ssvm_worker.config.schema import SERVER_PREFIX, Settings
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, ResourceBusy, StoreUnavailable, WorkerError
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.download.image import durable_bytes
from ssvm_worker.jobs.request import fingerprint
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.link_expiry import cancelled, end_links
from ssvm_worker.ledger.links import Link
from ssvm_worker.ledger.record import INBOUND, Claim
from ssvm_worker.ledger.retry_policy import RetryDecision
from ssvm_worker.operations.traces import tracing
from ssvm_worker.runner.heartbeat import ClaimHeartbeat
from ssvm_worker.runner.run import JobRun, worker_name
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.wiring.assembly import Stores, new_job, open_links
from ssvm_worker.wiring.server_names import with_server_names

from .push_source import Sender, SenderConnections, SentVersion

_LOG = logging.getLogger("ssvm.serve")
#: Attempts of one link without a pause, and in total.
_FREE_ATTEMPTS, _MAX_ATTEMPTS = 5, 50
_MAX_PAUSE_S = 120


@dataclass
class _Upload(JobRun):
    """An attempt at an upload. Only the client can start another attempt."""

    sender: Sender

    @cached_property
    def _attempt(self) -> Attempt:
        attempt = super()._attempt
        attempt.services.connections = SenderConnections(self.settings, self.sender)
        download = self.settings.download.model_copy(update={"resumes": 0})
        attempt.settings = self.settings.model_copy(update={"download": download})
        return attempt

    def _will_resume(self, error: BaseException) -> bool:
        return self.sender.resumable and super()._will_resume(error)

    def _decide(self, error: BaseException) -> RetryDecision:
        if isinstance(error, WorkerError) and error.retryable:
            return RetryDecision("queued", counted=False)
        return super()._decide(error)

    def reset(self) -> None:
        """Remove the received bytes and queue the job, which waits for the client again."""
        self._discard()
        self.ledger.release(self.claim, None, counted=False)


@dataclass(frozen=True)
class Inbox:
    """The jobs of uploads. Every method blocks, and raises StoreUnavailable if the ledger is unreachable."""

    settings: Settings
    ledger: Ledger

    def state(self, link: Link) -> str:
        """Return the state of the link's job; "" if no client has sent anything."""
        try:
            return self.ledger.get(link.job_id).state
        except ObjectNotFound:
            return ""

    def wait_s(self, link: Link) -> int:
        """Return the seconds until the link may start another attempt; raise InvalidRequest after too many attempts.

        The first attempts need no pause. Then each pause is twice as long as the one before.
        """
        try:
            record = self.ledger.get(link.job_id)
        except ObjectNotFound:
            return 0
        number = record.attempted
        if number >= _MAX_ATTEMPTS:
            raise InvalidRequest(f"The upload has had {number} attempts", link.key, "Ask for a new link")
        if number <= _FREE_ATTEMPTS:
            return 0
        pause = min(1 << (number - _FREE_ATTEMPTS), _MAX_PAUSE_S)
        return max(0, min(pause, math.ceil(record.attempts[-1].ended + pause - time.time())))

    def claim(self, link: Link) -> Claim:
        """Claim the link's job for this process. A failed job is retried.

        Raises ResourceBusy if another client sends, or another job writes the artifact. Raises InvalidRequest if the
        link has been used.
        """
        of_server = link.id.startswith(SERVER_PREFIX)
        new = new_job(self.settings, JOBS["download"], link.request, default_id=link.job_id, of_server=of_server)
        record, _ = self.ledger.submit(replace(new, lane=INBOUND))
        if record.state in ("succeeded", "cancelled"):
            raise InvalidRequest(
                f"The upload of this link has ended: its state is {record.state}", link.key, "Ask for a new link"
            )
        if record.state == "failed":
            self.ledger.retry(link.job_id, "its sender")
        claim = self.ledger.claim(link.job_id, worker_name())
        if claim is None:
            what = "Another upload or job is writing this artifact"
            raise ResourceBusy(what, link.key, "Retry when it has finished")
        return claim

    def run(self, claim: Claim, sender: Sender) -> None:
        """Run the job, which stores the bytes of the sender; raise the job's error."""
        try:
            attributes: dict[str, Any] = {"job_id": claim.job_id, "lane": INBOUND, "attempt": claim.number}
            settings = self._settings(claim.job_id, claim.record.request)
            with ClaimHeartbeat(self.ledger, claim) as heartbeat, tracing("download", **attributes) as trace:
                outcome = _Upload(settings, self.ledger, claim, heartbeat, sender, trace=trace).run()
        finally:
            sender.close()
        record = self.ledger.get(claim.job_id)
        if outcome["state"] == "fenced":
            raise StoreUnavailable(
                "The claim of this upload was lost", claim.job_id, "Query the offset (HEAD) and resume"
            )
        if record.state != "succeeded":
            raise UploadFailed.of(record.error)

    def stored(self, link: Link, length: int) -> int:
        """Return the offset at which the client must resume the upload of a file of this length."""
        store, artifact = self._store(link), Artifact.of_prefix(link.key)
        draft = read_draft(store, artifact) if store.resumable else None
        version = {"link": link.id, "length": length}
        origin = {"fingerprint": fingerprint(link.request["url"]), "validator": version}
        if draft is None or {name: draft.source.get(name) for name in origin} != origin:
            return 0
        key = artifact.key(draft.facts["name"])
        left = sum(each.size for each in store.leftovers(artifact.prefix) if each.key == key)
        return min(left, durable_bytes(draft))

    def reset(self, link: Link) -> None:
        """Remove the received bytes. The link stays valid. Raise ResourceBusy if another client sends."""
        store, artifact = self._store(link), Artifact.of_prefix(link.key)
        if self.state(link) not in ("queued", "failed", "running") or read_draft(store, artifact) is None:
            return  # no attempt will resume from bytes without a draft
        claim = self.claim(link)
        settings = self._settings(link.job_id, link.request)
        with ClaimHeartbeat(self.ledger, claim) as heartbeat:
            _Upload(settings, self.ledger, claim, heartbeat, Sender(link.path, None)).reset()

    def _settings(self, job_id: str, request: dict[str, Any]) -> Settings:
        return with_server_names(self.settings, "download", job_id, request)

    def _store(self, link: Link) -> Store:
        return Stores(self._settings(link.job_id, link.request))[link.store]

    def forget(self, link: Link) -> None:
        """Revoke the link and remove the received bytes."""
        open_links(self.settings).revoke(link)
        self.end(link.id)

    def end(self, link_id: str) -> None:
        """End the job of an invalid link and remove the received bytes, unless a client is sending now."""
        if claim := cancelled(self.ledger, link_id):
            settings = self._settings(claim.job_id, claim.record.request)
            with ClaimHeartbeat(self.ledger, claim) as heartbeat:
                _Upload(settings, self.ledger, claim, heartbeat, Sender(claim.job_id, None)).run()

    def end_links(self) -> None:
        """Remove ended links, and the received bytes of their incomplete uploads."""
        end_links(self.ledger, open_links(self.settings), self.end)


class UploadFailed(WorkerError):
    """The error of the job, as the ledger's record has it."""

    def __init__(self, what: str, where: str = "", remedy: str = "", kind: str = "") -> None:
        super().__init__(what, where, remedy)
        self.args = (what, where, remedy, kind)
        self.kind = kind

    @classmethod
    def of(cls, error: dict[str, object] | None) -> UploadFailed:
        """Return the error for a record's error object."""
        values = error or {"error": "Cancelled", "what": "The upload was cancelled"}
        what, where, remedy, kind = (str(values.get(each, "")) for each in ("what", "where", "remedy", "error"))
        return cls(what, where, remedy, kind)

    def as_dict(self) -> dict[str, object]:
        """Return the error object with the name of the job's error class."""
        return super().as_dict() | {"error": self.kind}


def sender_of(link: Link, length: int | None, offset: int = 0, *, resumable: bool = False) -> Sender:
    """Return the source of an upload through a link."""
    version = SentVersion(link.id, length) if resumable and length is not None else None
    return Sender(f"upload:{PurePosixPath(link.key).name}", length, offset, version)
