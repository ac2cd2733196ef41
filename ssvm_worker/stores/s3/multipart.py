"""The parts of multipart uploads: how large they are, what is sent as one, and those that a server has already."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from ssvm_worker.errors import Cancelled
from ssvm_worker.units import KiB

from .capabilities import base64_of
from .client import Bucket
from .errors import code_of
from .responses import etag_in, time_in

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import MultipartUploadTypeDef

#: S3's own limit. Parts by the hint leave a tenth of it for a hint that was too small.
MAX_PARTS = 10_000
_BY_HINT = 9_000
#: Without a hint, parts grow twofold every 1000 after the first 3000: 15 GiB in the smallest parts, 1.2 TiB in all.
_STEADY, _STEP = 3000, 1000
#: Bytes that go to the socket at once. The SDK asks for 16 KiB at a time; these, hashed where they lie, cost a tenth of
#: the CPU time less. A socket's time-out is for all that it is given at once, so more would be a stall on a slow line.
_PIECE = 256 * KiB


def part_size(number: int, least: int, size_hint: int | None, sent: int) -> int:
    """Bytes of part *number* (from 1), when *sent* bytes have gone before it.

    Equal parts while the hint holds; beyond it, or without one, they grow, so that MAX_PARTS suffice. An object of
    more than BUDGET * 9000, 281 GiB, costs one of its parts in memory.
    """
    if size_hint and sent < size_hint:
        return max(least, -(-size_hint // _BY_HINT))
    return int(least * 2 ** max(0, -(-(number - _STEADY) // _STEP)))


class PartBody:
    """What is sent at once: a file over pieces that are not copied, with their digests; a retry reads it again."""

    def __init__(self, pieces: list[memoryview], wanted: Callable[[], bool]) -> None:
        self._pieces = pieces
        self._wanted = wanted
        self.size = sum(map(len, pieces))
        self._position = self._read = 0

    @cached_property
    def sha256(self) -> bytes:
        """Of all of it; the signature is made of it too, see ``s3_bucket``."""
        return self._hashed(hashlib.sha256())

    @cached_property
    def md5(self) -> bytes:
        """What the ETag of a part is, but on servers that encrypt."""
        return self._hashed(hashlib.md5(usedforsecurity=False))

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes | memoryview:  # noqa: ARG002
        """The next bytes, however many were asked for, none only at the end.

        Raises Cancelled when the upload was aborted meanwhile.
        """
        if not self._wanted():
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
        """Return how many bytes were read in all, by all tries."""
        return self._read

    def _hashed(self, hasher: Any) -> bytes:
        for piece in self._pieces:
            hasher.update(piece)
        return bytes(hasher.digest())


@dataclass(frozen=True)
class UploadedPart:
    """What a server has, or says that it has."""

    size: int
    etag: str
    #: As S3 writes it; empty where the server does not tell.
    sha256: str = ""
    #: Seconds since the epoch.
    when: float = 0.0

    def has(self, body: PartBody) -> bool:
        """Whether it has these very bytes. By MD5, which the ETag is, only where the server tells nothing better."""
        if self.size != body.size:
            return False
        return self.sha256 == base64_of(body.sha256) if self.sha256 else self.etag == body.md5.hex()


def parts_of(bucket: Bucket, upload: MultipartUploadTypeDef) -> Iterator[tuple[int, UploadedPart]]:
    """The parts of an upload by number; none of one that is gone."""
    pages = bucket.client.get_paginator("list_parts")
    with contextlib.suppress(bucket.client.exceptions.NoSuchUpload):
        for page in pages.paginate(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"]):
            for each in page.get("Parts", []):
                part = UploadedPart(each.get("Size", -1), etag_in(each), each.get("ChecksumSHA256", ""), time_in(each))
                yield each["PartNumber"], part


def open_uploads(bucket: Bucket, prefix: str) -> Iterator[MultipartUploadTypeDef]:
    """The multipart uploads whose key begins with *prefix*."""
    # Not the SDK's paginator: SeaweedFS leaves out NextKeyMarker, and the last key of a page serves as well.
    marker: dict[str, Any] = {}
    while True:
        try:
            page = bucket.client.list_multipart_uploads(Bucket=bucket.name, Prefix=prefix, **marker)
        except bucket.client.exceptions.NoSuchUpload:
            return  # rclone's way to say that the bucket has none
        uploads = [each for each in page.get("Uploads", []) if "Key" in each and "UploadId" in each]
        yield from uploads
        if not page.get("IsTruncated") or not uploads:
            return
        last = uploads[-1]
        marker = {"KeyMarker": last["Key"], "UploadIdMarker": last["UploadId"]}


def abort_upload(bucket: Bucket, upload: MultipartUploadTypeDef) -> None:
    """Abort an upload; one that is gone already is fine."""
    try:
        bucket.client.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
    except ClientError as error:
        if code_of(error)[1] != 404:
            raise


def take_over(bucket: Bucket, path: str) -> tuple[str, dict[int, UploadedPart]]:
    """The newest upload for exactly that key, whoever began it, with the parts that it has; the others are aborted.

    Nothing to take over: an empty id. Only one job at a time writes a key: what is open there is dead, or fenced.
    """
    left = _open_for(bucket, path)
    found: tuple[str, dict[int, UploadedPart]] = ("", {})
    for each in sorted(left, key=lambda upload: time_in(upload, "Initiated"), reverse=True):
        parts = {} if found[0] else dict(parts_of(bucket, each))
        if parts:
            found = each["UploadId"], parts
        else:
            abort_upload(bucket, each)
    return found


def _open_for(bucket: Bucket, path: str) -> list[MultipartUploadTypeDef]:
    """Those of exactly that key; none where we may not ask, as in a stranger's bucket that we may only write to."""
    try:
        return [each for each in open_uploads(bucket, path) if each["Key"] == path]
    except ClientError as error:
        if code_of(error)[1] not in (403, 405, 501):
            raise
        return []


def etag_of(parts: list[str]) -> str:
    """The ETag of an object made of parts with these ETags: the MD5 of their MD5s; empty where they are none."""
    try:
        joined = b"".join(map(bytes.fromhex, parts))
    except ValueError:
        return ""
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"
