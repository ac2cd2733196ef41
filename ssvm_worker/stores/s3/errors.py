"""What an S3 server and its SDK say, in our words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any

import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProxyConnectionError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from ssvm_worker.errors import (
    ConfigError,
    ObjectNotFound,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.net.sockets import Stalled

#: All that a call of the SDK may raise, but for what the caller's check does.
SDK_ERRORS = (ClientError, BotoCoreError, ResponseParserError, Stalled)
#: What a body that is read may raise: the SDK translates some of it only.
BODY_ERRORS = (BotoCoreError, urllib3.exceptions.HTTPError, HTTPException, OSError)
#: Of these nothing has reached the server.
_NOT_SENT = (ConnectTimeoutError, EndpointConnectionError, ProxyConnectionError, SSLError)
_FULL = {"EntityTooLarge", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "TooManyBuckets"}
#: 400s that say something of the moment or of the wire, not of the request.
_PASSING = {
    "RequestTimeout",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "OperationAborted",
    "ConditionalRequestConflict",
}
#: Seconds by which a signature's time may be wrong (S3's API reference, "RequestTimeTooSkewed").
_SKEW_S = 15 * 60
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}


@contextlib.contextmanager
def translating(where: str) -> Iterator[None]:
    """Raise our errors in place of the SDK's; *where* names store and key, or bucket and endpoint."""
    try:
        yield
    except ClientError as error:
        said = _answered(error, where)
        said.after_s = retry_after(error.response)
        raise said from error
    except Stalled as error:
        raise StoreUnavailable(f"The store is silent: {error}", where, "Look at the store and the network") from error
    except ResponseParserError as error:
        what = "The answer is not that of an S3 server"
        raise StoreUnavailable(what, where, "Look at the endpoint, and at what is in front of it") from error
    except BotoCoreError as error:
        raise _failed(error, where) from error


def code_of(error: ClientError) -> tuple[str, int]:
    """The server's error code and the HTTP status; an answer to HEAD has the status for both."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return error.response.get("Error", {}).get("Code", ""), status


def is_broken(error: BaseException | None) -> bool:
    """Tell whether the connection broke, or nothing came, so that the call may have taken effect."""
    return isinstance(error, (HTTPClientError, Stalled, ResponseParserError)) and not isinstance(error, _NOT_SENT)


def is_unclear(error: BaseException) -> bool:
    """Tell whether a call that failed so may have taken effect all the same."""
    return is_broken(error) or (isinstance(error, ClientError) and code_of(error)[1] in (500, 502, 504))


def is_outage(error: BaseException | None) -> bool:
    """Tell whether the whole server may be away, as seen by one call."""
    return is_broken(error) or isinstance(error, _NOT_SENT) or (isinstance(error, ClientError) and is_unclear(error))


def asks_to_wait(error: BaseException | None) -> bool:
    """Return whether the server says that it is unavailable or overloaded."""
    if not isinstance(error, ClientError):
        return False
    code, status = code_of(error)
    return status in (429, 503) or code in ("SlowDown", "Throttling", "TooManyRequests", "ServiceUnavailable")


def retry_after(answer: Any) -> float:
    """Return the seconds that a parsed answer asks to wait; 0: none, or no number."""
    told = str(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    try:
        return float(told) if told.isdecimal() else max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def no_bucket(where: str) -> StoreDenied:
    """The error for a bucket that is not there; no bucket is ever made silently."""
    return StoreDenied("The bucket does not exist", where, "Make it, or name another in the store's url")


def _answered(error: ClientError, where: str) -> WorkerError:
    code, status = code_of(error)
    if code == "NoSuchBucket":
        return no_bucket(where)
    if code == "NoSuchUpload":
        # Who ended it, the server does not say: a sweep, a rule of the bucket, or an attempt that took it over.
        return StoreUnavailable("The multipart upload was ended by somebody else", where, "Try again")
    if status == 404:
        return ObjectNotFound("There is no such object", where, "`ssvm list` tells what is there")
    if status == 403 and (code == "RequestTimeTooSkewed" or _seconds_off(error) > _SKEW_S):
        # Another worker's clock may be right, and this one's is set right by nobody who knows of the job.
        what = f"The store refuses us as our clock, or its own, is wrong (status {status})"
        return StoreUnavailable(what, where, "Set the clock, and look whether NTP runs")
    return _refused(code, status, where)


def _seconds_off(error: ClientError) -> float:
    """How far apart our clock and the server's are; an answer to HEAD has no code that would tell it."""
    told = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return abs(time.time() - parsedate_to_datetime(told).timestamp())
    except ValueError:
        return 0.0


def _refused(code: str, status: int, where: str) -> WorkerError:
    said = code if code == str(status) else f"{code}, status {status}"
    if code in _FULL or status == 507:
        return StoreFull(f"The store does not take that much ({said})", where, "Make room, or raise its quota or limit")
    if code in _REGION or status == 301:
        return StoreDenied(f"The bucket is elsewhere ({said})", where, "Correct the store's region and endpoint")
    if status in (401, 403):
        return StoreDenied(
            f"The store refuses us ({said})", where, "Check access_key and secret_key, and what they are allowed to do"
        )
    if status >= 500 or status == 429 or code in _PASSING:
        return StoreUnavailable(f"The store cannot serve us now ({said})", where, "Look at the store; try again later")
    return StoreDenied(f"The store does not take the request ({said})", where, "Look at the store's url and log")


def _failed(error: BotoCoreError, where: str) -> WorkerError:
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return ConfigError("There are no keys for the store", where, "Set access_key and secret_key")
    if isinstance(error, ParamValidationError):
        return ConfigError(f"S3 knows no such name: {error}", where, "Correct the bucket in the url")
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StoreDenied(
            "The store's certificate is not trusted", where, "Name your authority's certificate in ca_file"
        )
    return StoreUnavailable(f"The store does not answer: {error}", where, "Is its endpoint right, and does it run?")
