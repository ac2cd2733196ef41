"""Parse the answers of S3 services, and translate the errors of services and SDK to the worker's errors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
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
from urllib3.util.ssl_match_hostname import CertificateError

from ssvm_worker.errors import (
    ConfigError,
    ObjectNotFound,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.net.sockets import Stalled

#: All errors that a call of the SDK may raise, except errors of the caller's check.
SDK_ERRORS = (ClientError, BotoCoreError, ResponseParserError, Stalled)
#: Errors while a body is read. The SDK translates only some of them.
BODY_ERRORS = (BotoCoreError, urllib3.exceptions.HTTPError, HTTPException, OSError)
#: After these errors the server has received nothing.
_NOT_SENT = (ConnectTimeoutError, EndpointConnectionError, ProxyConnectionError, SSLError)
_FULL = {"EntityTooLarge", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "TooManyBuckets"}
#: Codes with status 400 whose cause is temporary or in the network, not in the request.
_TEMPORARY = {
    "RequestTimeout",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "OperationAborted",
    "ConditionalRequestConflict",
}
#: The maximum error of a signature's time in seconds (S3's API reference, "RequestTimeTooSkewed").
_MAX_SKEW_S = 15 * 60
#: The server does not know the access key, or the secret key is wrong.
#: The last one is versitygw's, with status 404.
_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "XAdminUserNotFound"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}

# Answers. Some S3 services, and some proxies in front of them, omit fields.


def etag_in(answer: Mapping[str, Any]) -> str:
    """Return the ETag without quotes. Without an ETag it is empty."""
    return str(answer.get("ETag") or "").strip('"')


def time_in(answer: Mapping[str, Any], name: str = "LastModified") -> float:
    """Return a time in seconds since the epoch. Without a time return now, so that a sweep does not treat it as old."""
    found = answer.get(name)
    return float(found.timestamp()) if found else time.time()


def size_in(answer: Mapping[str, Any], location: str) -> int:
    """Return the size in an answer to HEAD or in an item of a list. Raise StoreUnavailable without a size."""
    found = answer.get("ContentLength", answer.get("Size"))
    if found is None:
        what = "The store does not send the object's size: its answer has no Content-Length or Size"
        raise StoreUnavailable(what, location, "Check the service, and the proxies in front of it")
    return int(found)


def whole_size(answer: Mapping[str, Any]) -> int | None:
    """Return the size of the whole object from an answer to GET, with or without a range. None: no size."""
    _, _, total = str(answer.get("ContentRange") or "").partition("/")
    if total.isdecimal():
        return int(total)
    return None if answer.get("ContentRange") else answer.get("ContentLength")


def range_begin(answer: Mapping[str, Any]) -> int:
    """Return the offset in the object of an answer's first byte. Without a valid Content-Range it is 0."""
    unit, _, numbers = str(answer.get("ContentRange") or "").partition(" ")
    first = numbers.partition("-")[0].strip()
    return int(first) if unit.lower() == "bytes" and first.isdecimal() else 0


def version_of(answer: Mapping[str, Any]) -> str:
    """Return a text that identifies this version of an object: its ETag or its time. Without both it is empty."""
    modified = answer.get("LastModified")
    return etag_in(answer) or (modified.isoformat() if modified else "")


def retry_after(answer: Any) -> float:
    """Return the seconds that a parsed answer asks the client to wait, or 0."""
    value = _header(answer, "retry-after")
    try:
        return float(value) if value.isdecimal() else max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _header(answer: Any, name: str) -> str:
    return str(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get(name, ""))


# Errors.


@contextlib.contextmanager
def translating(location: str) -> Iterator[None]:
    """Translate the SDK's errors while the block runs. *location* names store and key, or bucket and endpoint."""
    try:
        yield
    except ClientError as error:
        translated = _answered(error, location)
        translated.after_s = retry_after(error.response)
        raise translated from error
    except Stalled as error:
        what = f"The store does not answer: {error}"
        raise StoreUnavailable(what, location, "Check the store and the network") from error
    except ResponseParserError as error:
        what = "The answer does not come from an S3 server"
        raise StoreUnavailable(what, location, "Check the endpoint, and the proxies in front of it") from error
    except BotoCoreError as error:
        raise _failed(error, location) from error


def code_of(error: ClientError) -> tuple[str, int]:
    """Return the server's error code and the HTTP status. An answer to HEAD has the status as its code."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return error.response.get("Error", {}).get("Code", ""), status


def is_broken(error: BaseException | None) -> bool:
    """Return whether the connection broke or stalled. The server may have executed the call."""
    return isinstance(error, (HTTPClientError, Stalled, ResponseParserError)) and not isinstance(error, _NOT_SENT)


def is_unclear(error: BaseException) -> bool:
    """Return whether the server may have executed the failed call."""
    return is_broken(error) or (isinstance(error, ClientError) and code_of(error)[1] in (500, 502, 504))


def is_outage(error: BaseException | None) -> bool:
    """Return whether the whole server may be unavailable."""
    return is_broken(error) or isinstance(error, _NOT_SENT) or (isinstance(error, ClientError) and is_unclear(error))


def asks_to_wait(error: BaseException | None) -> bool:
    """Return whether the server reports that it is unavailable or overloaded."""
    if not isinstance(error, ClientError):
        return False
    code, status = code_of(error)
    return status in (429, 503) or code in ("SlowDown", "Throttling", "TooManyRequests", "ServiceUnavailable")


def no_bucket(location: str) -> StoreDenied:
    """Return the error for a missing bucket. The worker never creates buckets."""
    return StoreDenied("The bucket does not exist", location, "Create it, or set another bucket in the store's url")


def _answered(error: ClientError, location: str) -> WorkerError:
    """Return the worker's error for an error in the server's answer."""
    code, status = code_of(error)
    if code == "NoSuchBucket":
        return no_bucket(location)
    if code == "NoSuchUpload":
        # The cause is unknown: a sweep, a lifecycle rule of the bucket, or an attempt that took over the upload.
        return StoreUnavailable("The multipart upload was ended by another process", location, "Retry")
    if status == 404 and code not in _KEYS:
        return ObjectNotFound("The object does not exist", location, "`ssvm list` shows the objects of a store")
    if status == 403 and (code == "RequestTimeTooSkewed" or _clock_difference(error) > _MAX_SKEW_S):
        # Not permanent: another worker's clock may be right. After a permanent error the job would not run again when
        # the clock is corrected.
        what = f"The clock of this host or of the store is wrong, so the store denies access (status {status})"
        return StoreUnavailable(what, location, "Set the clock, and check that NTP runs")
    return _rejected(code, status, location)


def _clock_difference(error: ClientError) -> float:
    """Return the difference of this host's clock and the server's in seconds. An answer to HEAD has no code for it."""
    try:
        return abs(time.time() - parsedate_to_datetime(_header(error.response, "date")).timestamp())
    except ValueError:
        return 0.0


def _rejected(code: str, status: int, location: str) -> WorkerError:
    reason = code if code == str(status) else f"{code}, status {status}"
    if code in _FULL or status == 507:
        remedy = "Delete artifacts (`ssvm list`, `ssvm delete`), or raise its quota or limit"
        return StoreFull(f"The store is full, or the object exceeds its limit ({reason})", location, remedy)
    if code in _REGION or status == 301:
        what = f"The bucket is in another region or at another endpoint ({reason})"
        return StoreDenied(what, location, "Correct the store's region and endpoint")
    if code in _KEYS or status == 401:
        remedy = "Correct access_key and secret_key of the store"
        return StoreDenied(f"The store refuses the keys ({reason})", location, remedy)
    if status == 403:
        remedy = "Check access_key and secret_key, and their permissions"
        return StoreDenied(f"The store denies access ({reason})", location, remedy)
    if status >= 500 or status == 429 or code in _TEMPORARY:
        return StoreUnavailable(f"The store is unavailable ({reason})", location, "Check the store, and retry later")
    return StoreDenied(f"The store rejects the request ({reason})", location, "Check the store's url and log")


def _is_for_another_host(error: SSLError) -> bool:
    """Return whether urllib3 has refused the certificate. It compares the host's name itself."""
    causes = getattr(error.kwargs.get("error"), "args", ())
    return any(isinstance(each, CertificateError) for each in causes)


def _failed(error: BotoCoreError, location: str) -> WorkerError:
    """Return the worker's error for an error of the SDK without an answer."""
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return ConfigError("The store has no keys", location, "Set access_key and secret_key")
    if isinstance(error, ParamValidationError):
        return ConfigError(f"Invalid name for S3: {error}", location, "Correct the bucket in the url")
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        remedy = "For a private authority, set its certificate in ca_file"
        return StoreDenied("The store's certificate is not trusted", location, remedy)
    if isinstance(error, SSLError) and _is_for_another_host(error):
        remedy = "Give the endpoint by a name that is in its certificate"
        return StoreDenied("The store's certificate is for another host", location, remedy)
    return StoreUnavailable(f"The store does not answer: {error}", location, "Check its endpoint, and that it runs")
