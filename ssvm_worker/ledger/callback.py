"""The POST of the job's record to its callback URL, signed, and tried again until it is taken."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import urllib3

from ssvm_worker.retry import RetryPolicy, backoff

from .ledger import Ledger
from .record import Record

#: Seconds beyond the time-out after which a callback that a worker took is taken for left behind by its death.
_LEASE_S = 30.0


@dataclass(frozen=True)
class CallbackSettings:
    """How callbacks are sent."""

    #: Key of the HMAC-SHA256; None leaves the signature out.
    secret: str | None = None
    timeout_s: float = 10.0
    max_tries: int = 8
    ca_file: str | None = None
    #: How far apart the tries are.
    policy: RetryPolicy = field(default_factory=RetryPolicy)


class Callbacks:
    """Sends what is due. At least once: a worker that dies between the answer and the note sends it again."""

    def __init__(self, ledger: Ledger, settings: CallbackSettings, show: Callable[[Record], dict[str, Any]]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._show = show
        self._pool = urllib3.PoolManager(
            cert_reqs="CERT_REQUIRED",
            ca_certs=settings.ca_file,
            timeout=urllib3.Timeout(total=settings.timeout_s),
            retries=False,
        )

    def send_due(self, job_id: str = "") -> bool:
        """Send one callback that is due, or that job's; False if there is none.

        Raises StoreUnavailable when the ledger is away; what becomes of the POST itself is noted in the record.
        """
        record = self._ledger.take_callback(_LEASE_S + self._settings.timeout_s, job_id)
        if record is None:
            return False
        number = record.callback.tries + 1
        problem = self._post(record, number)
        if not problem:
            self._ledger.note_callback(record.job_id, "delivered")
        elif number >= self._settings.max_tries:
            self._ledger.note_callback(record.job_id, "failed", problem)
        else:
            self._ledger.note_callback(record.job_id, "pending", problem, backoff(number, self._settings.policy))
        return True

    def _post(self, record: Record, number: int) -> str:
        """What went wrong, or "". The URL's query may hold a secret, so it is in no message."""
        body = json.dumps(self._show(record)).encode()
        try:
            answer = self._pool.request(
                "POST",
                record.callback.url,
                body=body,
                headers=self._headers(record, body, number),
                redirect=False,
                preload_content=False,
            )
        except urllib3.exceptions.HTTPError as error:
            return f"no answer: {type(error).__name__}"
        status = answer.status
        answer.close()
        return "" if 200 <= status < 300 else f"the answer was {status}"

    def _headers(self, record: Record, body: bytes, number: int) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "X-SSVM-Job": record.job_id,
            "X-SSVM-Delivery-Attempt": str(number),
        }
        if self._settings.secret:
            headers["X-SSVM-Signature"] = f"sha256={signature(self._settings.secret, body)}"
        return headers


def signature(secret: str, body: bytes) -> str:
    """The hex HMAC-SHA256 by which the receiver knows that the raw body is ours."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
