"""The POST of the job's record to its callback URL, signed, and tried again until it is taken."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ssvm_worker import __version__
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.sockets import AddressRefused, ConnectOptions, StallWatch, WatchedSocket, connect, tls_context
from ssvm_worker.net.urls import WebUrl, parse

from .ledger import Ledger
from .record import Record
from .retry_policy import RetryPolicy, backoff

_LOG = logging.getLogger("ssvm.callback")
#: Seconds beyond the time-out after which a callback that a worker took is taken for left behind by its death.
_LEASE_S = 30.0
#: Bytes of an answer's head, interim answers included; what comes behind them is not read.
_MOST_HEAD = 64 * 1024
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: |\r?\n)")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True)
class CallbackSettings:
    """How callbacks are sent."""

    #: Key of the HMAC-SHA256; None leaves the signature out.
    secret: str | None = None
    #: For the whole exchange, from the connection to the last byte of the answer's head.
    timeout_s: float = 10.0
    #: Where receivers may be.
    rule: AddressRule = field(default_factory=AddressRule)
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

    def send_due(self, job_id: str = "") -> bool:
        """Send one callback that is due, or that job's; False if there is none.

        Raises StoreUnavailable when the ledger is away; what becomes of the POST itself is noted in the record.
        """
        record = self._ledger.take_callback(_LEASE_S + self._settings.timeout_s, job_id)
        if record is None:
            return False
        number = record.callback.tries + 1
        try:
            problem = self._post(record, number)
        except Exception:  # noqa: BLE001 - one odd record must count as a try, or it is taken up again for ever
            _LOG.exception("the callback of job %s cannot be made", record.job_id)
            problem = "the callback cannot be made; see the worker's log"
        if not problem:
            self._ledger.note_callback(record.job_id, "delivered")
        elif number >= self._settings.max_tries:
            self._ledger.note_callback(record.job_id, "failed", problem)
        else:
            self._ledger.note_callback(record.job_id, "pending", problem, backoff(number, self._settings.policy))
        return True

    def _post(self, record: Record, number: int) -> str:
        """What went wrong, or "".

        The record's readers may be strangers. They learn neither the URL's secrets, nor what a network of ours
        answers: of all that keeps us from an answer they see the same words. The log has the reason.
        """
        body = json.dumps(self._show(record)).encode()
        try:
            url = _destination(record.callback.url)
            status = self._exchange(url, _request(url, self._headers(record, body, number), body))
        except InvalidRequest as error:
            return error.what
        except AddressRefused as error:
            _LOG.warning("the callback of job %s is not sent: %s", record.job_id, error)
            return "not sent: callback.allow_networks does not allow the address"
        except OSError as error:
            _LOG.warning("the callback of job %s got no answer: %s", record.job_id, error)
            return "no answer"
        return "" if 200 <= status < 300 else f"the answer was {status}"

    def _exchange(self, url: WebUrl, request: bytes) -> int:
        """Send the request and return the status of the answer; OSError, by the deadline at the latest."""
        settings = self._settings
        until = time.monotonic() + settings.timeout_s

        def check() -> None:
            if time.monotonic() > until:
                raise TimeoutError(f"The exchange is not over after {settings.timeout_s:g} s")

        dial = ConnectOptions(
            settings.rule, settings.timeout_s, tls_context(settings.ca_file) if url.scheme == "https" else None
        )
        line = connect(url.host, url.port, dial, StallWatch(check, settings.timeout_s, 0))
        try:
            line.sendall(request)
            return _status(line, check)
        finally:
            line.close()

    def _headers(self, record: Record, body: bytes, number: int) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "X-SSVM-Job": record.job_id,
            "X-SSVM-Delivery-Attempt": str(number),
        }
        if self._settings.secret:
            headers["X-SSVM-Signature"] = f"sha256={signature(self._settings.secret, body)}"
        return headers


def _destination(url: str) -> WebUrl:
    """Where to send; an older version took URLs with a user and password, and sent neither."""
    try:
        parts = urlsplit(url)
        return parse(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
    except ValueError as error:
        raise InvalidRequest("This is no URL", "callback_url") from error


def _request(url: WebUrl, headers: dict[str, str], body: bytes) -> bytes:
    """The request, after which the receiver shall close the connection."""
    ours = {"Host": url.authority, "User-Agent": f"ssvm-worker/{__version__}", "Connection": "close"}
    lines = [f"{name}: {value}" for name, value in {**ours, **headers, "Content-Length": len(body)}.items()]
    return "\r\n".join([f"POST {url.target} HTTP/1.1", *lines, "", ""]).encode() + body


def _status(line: WatchedSocket, check: Callable[[], None]) -> int:
    """The status of the answer behind interim ones (RFC 9110, 15.2), once its head is complete."""
    head, piece = b"", bytearray(4096)
    while len(head) < _MOST_HEAD:
        check()
        got = line.recv_into(piece)
        if not got:
            raise ConnectionError("The connection ended within the answer's head")
        head += piece[:got]
        while end := _END_OF_HEAD.search(head):
            found = _STATUS.match(head)
            if not found:
                raise ConnectionError("The answer is not HTTP/1.1")
            if not found[1].startswith(b"1"):
                return int(found[1])
            head = head[end.end() :]
    raise ConnectionError(f"The answer's head is longer than {_MOST_HEAD} bytes")


def signature(secret: str, body: bytes) -> str:
    """The hex HMAC-SHA256 by which the receiver knows that the raw body is ours."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
