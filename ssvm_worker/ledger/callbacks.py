"""Send callbacks: a signed POST of the job's record to its callback URL, repeated until the receiver accepts it."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ssvm_worker.config.schema import CallbackSection, RetrySection
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.sockets import AddressRefused
from ssvm_worker.net.urls import WebUrl, parse

from .ledger import Ledger
from .record import Record
from .retry_policy import backoff

_LOG = logging.getLogger("ssvm.callback")
#: Seconds that a worker's lease of a callback lasts beyond the time-out. Then another worker may send it.
_LEASE_S = 30.0


@dataclass(frozen=True)
class CallbackSettings:
    """The settings of callbacks."""

    #: The key of the HMAC-SHA256. None omits the signature.
    secret: str | None = None
    #: For the whole exchange, from the connection to the last byte of the response's head.
    timeout_s: float = CallbackSection().timeout_s
    #: The networks in which receivers may be.
    rule: AddressRule = field(default_factory=AddressRule)
    max_tries: int = CallbackSection().max_tries
    ca_file: str | None = None
    #: The delays between tries.
    policy: RetrySection = field(default_factory=RetrySection)


class Callbacks:
    """Sends due callbacks, at least once. If a worker dies before it stores the outcome, the callback is sent again."""

    def __init__(self, ledger: Ledger, settings: CallbackSettings, show: Callable[[Record], dict[str, Any]]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._show = show

    def send_due(self, job_id: str = "") -> bool:
        """Send one due callback: that of *job_id*, or any. Return False if none is due.

        The outcome of the POST is stored in the record. Raise StoreUnavailable while the ledger is away.
        """
        record = self._ledger.take_callback(_LEASE_S + self._settings.timeout_s, job_id)
        if record is None:
            return False
        number = record.callback.tries + 1
        try:
            problem = self._post(record, number)
        except Exception:  # noqa: BLE001 - an odd record must count as a try, or it is tried without end
            _LOG.exception("the callback of job %s failed: internal error", record.job_id)
            problem = "internal error; see the worker's log"
        if not problem:
            self._ledger.note_callback(record.job_id, "delivered")
        elif number >= self._settings.max_tries:
            self._ledger.note_callback(record.job_id, "failed", problem)
        else:
            self._ledger.note_callback(record.job_id, "pending", problem, backoff(number, self._settings.policy))
        return True

    def _post(self, record: Record, number: int) -> str:
        """Send the record. Return the problem, or "".

        Strangers may read the record, so it must show neither secrets of the URL nor responses of internal networks.
        Every problem without a response has the same text in the record. The log has the reason.
        """
        body = json.dumps(self._show(record)).encode()
        try:
            status = self._exchange(_destination(record.callback.url), self._headers(record, body, number), body)
        except InvalidRequest as error:
            return error.what
        except AddressRefused as error:
            _LOG.warning("the callback of job %s is not sent: %s", record.job_id, error)
            return "not sent: callback.allow_networks does not allow the address"
        except (OSError, HTTPException) as error:
            _LOG.warning("the callback of job %s got no answer: %s", record.job_id, error)
            return "no answer"
        return "" if 200 <= status < 300 else f"the answer was {status}"

    def _exchange(self, url: WebUrl, headers: dict[str, str], body: bytes) -> int:
        """Send a POST and return the status of the response. Its body is not read.

        Raise HTTPException or OSError, at the latest at the deadline.
        """
        from ssvm_worker.net.http import HttpOptions, HttpSession  # imports requests, which takes 8 MiB

        settings = self._settings
        until = time.monotonic() + settings.timeout_s

        def check() -> None:
            if time.monotonic() > until:
                raise TimeoutError(f"The exchange took more than {settings.timeout_s:g} s")

        limit = settings.timeout_s
        options = HttpOptions(settings.rule, limit, stall_s=limit, min_rate=0, ca_file=settings.ca_file)
        with HttpSession(options, check) as session:
            return session.exchange("POST", url, headers, body).status_code

    def _headers(self, record: Record, body: bytes, number: int) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "X-SSVM-Job": record.job_id,
            "X-SSVM-Delivery-Attempt": str(number),
        }
        if self._settings.secret:
            now = str(int(time.time()))
            headers["X-SSVM-Timestamp"] = now
            headers["X-SSVM-Signature-V2"] = f"sha256={signature(self._settings.secret, now.encode() + b'.' + body)}"
            # Receivers of version 0.2 verify this header. The release after the next one omits it.
            headers["X-SSVM-Signature"] = f"sha256={signature(self._settings.secret, body)}"
        return headers


def _destination(url: str) -> WebUrl:
    """Return the URL without user and password. Older versions accepted these, and did not send them."""
    try:
        parts = urlsplit(url)
        return parse(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
    except ValueError as error:
        raise InvalidRequest("Invalid URL", "callback_url") from error


def signature(secret: str, signed: bytes) -> str:
    """Return the hex HMAC-SHA256 of the signed bytes. The receiver uses it to verify the sender."""
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()
