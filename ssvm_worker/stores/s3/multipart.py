"""Multipart uploads: the size and body of parts, the parts on a server, and the removal of abandoned uploads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from ssvm_worker.errors import Cancelled, StoreUnavailable
from ssvm_worker.units import KiB

from .capabilities import base64_of
from .client import Bucket
from .responses import code_of, etag_in, time_in

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import MultipartUploadTypeDef

#: The limit of S3.
MAX_PARTS = 10_000
#: The number of parts of an object with a hint. It leaves a tenth of the limit for a hint that was too small.
_PARTS_BY_HINT = 9_000
#: Without a hint, the first 3000 parts have the minimum size: 15 GiB. Then the size doubles every 1000 parts: 1.2 TiB.
_STEADY, _STEP = 3000, 1000
#: Bytes for one call of the socket. The SDK asks for 16 KiB. Larger pieces, hashed without a copy, cost 10 % less CPU
#: time. The socket's timeout applies to one call, so still larger pieces would stall on a slow line.
_PIECE = 256 * KiB
#: The days of the lifecycle rule. No transfer lasts longer, and no job waits longer for its next attempt.
_ABANDONED_DAYS = 7
_ABORT_ACTION = "AbortIncompleteMultipartUpload"


def part_size(number: int, min_size: int, size_hint: int | None, sent: int) -> int:
    """Return the bytes of part *number* (from 1) after *sent* bytes.

    Up to the hint all parts have the same size. Beyond it, or without a hint, they grow, so that MAX_PARTS suffice.
    The parts of an object of more than BUDGET * 9000 bytes, 237 GiB, are larger than BUDGET. Then the upload holds one
    part in memory.
    """
    if size_hint and sent < size_hint:
        return max(min_size, -(-size_hint // _PARTS_BY_HINT))
    return int(min_size * 2 ** max(0, -(-(number - _STEADY) // _STEP)))


class PartBody:
    """The body of a request: a file over pieces without a copy, with its digests. A retry reads it again."""

    def __init__(self, pieces: list[memoryview], is_wanted: Callable[[], bool]) -> None:
        self._pieces = pieces
        self._is_wanted = is_wanted
        self.size = sum(map(len, pieces))
        self._position = self._read = 0

    @cached_property
    def sha256(self) -> bytes:
        """The SHA-256 of all bytes. The signature uses it, too; see ``client``."""
        return self._hashed(hashlib.sha256())

    @cached_property
    def md5(self) -> bytes:
        """The MD5 of all bytes. It is the ETag of a part, unless the server encrypts."""
        return self._hashed(hashlib.md5(usedforsecurity=False))

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, and return it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes | memoryview:  # noqa: ARG002
        """Return the next piece of any size. Only the end is empty. Raise Cancelled if the upload was aborted."""
        if not self._is_wanted():
            raise Cancelled("shutdown")
        start = self._position
        for piece in self._pieces:
            if start < len(piece):
                found = piece[start : start + _PIECE]
                self._position += len(found)
                self._read += len(found)
                return found
            start -= len(piece)
        return b""

    def moved(self) -> int:
        """Return the number of bytes that all tries have read."""
        return self._read

    def _hashed(self, hasher: Any) -> bytes:
        for piece in self._pieces:
            hasher.update(piece)
        return bytes(hasher.digest())


@dataclass(frozen=True)
class UploadedPart:
    """A part on a server, as the server reports it."""

    size: int
    etag: str
    #: In the encoding of S3. Empty if the server does not report it.
    sha256: str = ""
    #: Seconds since the epoch.
    modified: float = 0.0

    def has(self, body: PartBody) -> bool:
        """Return whether the part has the bytes of *body*. Without a SHA-256, the function compares ETag and MD5."""
        if self.size != body.size:
            return False
        return self.sha256 == base64_of(body.sha256) if self.sha256 else self.etag == body.md5.hex()


def parts_of(bucket: Bucket, upload: MultipartUploadTypeDef) -> Iterator[tuple[int, UploadedPart]]:
    """Yield the parts of an upload with their numbers. An ended upload has no parts."""
    pages = bucket.client.get_paginator("list_parts")
    with contextlib.suppress(bucket.client.exceptions.NoSuchUpload):
        for page in pages.paginate(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"]):
            for each in page.get("Parts", []):
                part = UploadedPart(each.get("Size", -1), etag_in(each), each.get("ChecksumSHA256", ""), time_in(each))
                yield each.get("PartNumber", 0), part


def open_uploads(bucket: Bucket, prefix: str) -> Iterator[MultipartUploadTypeDef]:
    """Yield the multipart uploads whose key begins with *prefix*."""
    # Not the SDK's paginator: SeaweedFS omits NextKeyMarker. The last key of a page has the same effect.
    marker: dict[str, Any] = {}
    seen: set[tuple[str, str]] = set()
    while True:
        try:
            page = bucket.client.list_multipart_uploads(Bucket=bucket.name, Prefix=prefix, **marker)
        except bucket.client.exceptions.NoSuchUpload:
            return  # rclone's answer for a bucket without uploads
        uploads = [each for each in page.get("Uploads", []) if "Key" in each and "UploadId" in each]
        yield from uploads
        if not page.get("IsTruncated") or not uploads:
            return
        last = uploads[-1]
        if (last["Key"], last["UploadId"]) in seen:
            what = "The store's list of multipart uploads has no end: a page was sent again"
            raise StoreUnavailable(what, bucket.location, "Check the service, and the proxies in front of it")
        seen.add((last["Key"], last["UploadId"]))
        marker = {"KeyMarker": last["Key"], "UploadIdMarker": last["UploadId"]}


def abort_upload(bucket: Bucket, upload: MultipartUploadTypeDef) -> None:
    """Abort an upload. An ended upload is not an error."""
    try:
        bucket.client.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
    except ClientError as error:
        if code_of(error)[1] != 404:
            raise


def take_over(bucket: Bucket, path: str) -> tuple[str, dict[int, UploadedPart]]:
    """Return the newest upload for exactly this key and its parts, and abort the other uploads for the key.

    Any job may have begun the upload. Without an upload the id is empty. Only one job at a time writes a key, so the
    writers of all open uploads are dead or fenced.
    """
    try:
        open_for_key = [each for each in open_uploads(bucket, path) if each["Key"] == path]
    except ClientError as error:
        if code_of(error)[1] not in (403, 405, 501):
            raise
        open_for_key = []  # the keys do not allow the list, for example in another owner's bucket
    found: tuple[str, dict[int, UploadedPart]] = ("", {})
    for each in sorted(open_for_key, key=lambda upload: time_in(upload, "Initiated"), reverse=True):
        parts = {} if found[0] else dict(parts_of(bucket, each))
        if parts:
            found = each["UploadId"], parts
        else:
            abort_upload(bucket, each)
    return found


def etag_of(parts: list[str]) -> str:
    """Return the ETag of an object from the ETags of its parts: the MD5 of their MD5s.

    If an ETag is not an MD5, the result is empty.
    """
    try:
        joined = b"".join(map(bytes.fromhex, parts))
    except ValueError:
        return ""
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"


def abandoned_uploads_rule(bucket: Bucket, root: str) -> str | None:
    """Return a command that adds a lifecycle rule to the bucket and keeps its other rules.

    The rule aborts abandoned uploads below *root*, even if the worker's clean-up never runs again. If the bucket has
    such a rule, the command is empty. None: the server has no lifecycle rules. Raises all other errors of the SDK.
    """
    try:
        rules: list[Any] = list(bucket.client.get_bucket_lifecycle_configuration(Bucket=bucket.name).get("Rules", []))
    except ClientError as error:
        code, status = code_of(error)
        if status in (405, 501):  # MethodNotAllowed, NotImplemented
            return None
        if code != "NoSuchLifecycleConfiguration":
            raise
        rules = []
    for rule in rules:
        # A rule with other filters than a prefix does not count.
        given = rule.get("Filter", rule)
        has_prefix_only = set(given) <= {"Prefix"} or given is rule
        is_active = rule.get("Status") == "Enabled" and _ABORT_ACTION in rule
        if is_active and has_prefix_only and root.startswith(str(given.get("Prefix", ""))):
            return ""
    new = {
        "ID": "abandoned-uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": root},
        _ABORT_ACTION: {"DaysAfterInitiation": _ABANDONED_DAYS},
    }
    endpoint = ["--endpoint-url", bucket.settings.endpoint] if bucket.settings.endpoint else []
    kept = [each for each in rules if each.get("ID") != new["ID"]]
    command = ["aws", "s3api", "put-bucket-lifecycle-configuration", *endpoint, "--bucket", bucket.name]
    return shlex.join([*command, "--lifecycle-configuration", json.dumps({"Rules": [*kept, new]}, default=str)])
