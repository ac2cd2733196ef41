"""Detect the optional features of an S3 server. Probe it once with tiny objects, and save the result on this host.

Servers describe few of their features, and ignore parameters that they do not know. So a feature counts only if the
server rejects an invalid request: bytes that do not match their digest, or a second object under an existing key.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from ssvm_worker.stores.ownership import give_to_owner

from .responses import SDK_ERRORS, code_of, etag_in

if TYPE_CHECKING:
    from .client import Bucket

#: The start of the name of the probe's object. A hidden name, so that no listing shows the object.
_NAME = ".ssvm-probe"
#: A saved result is valid for a week, because a server may be replaced or updated. `ssvm doctor` always probes.
_VALID_S = 7 * 24 * 3600
_BODY = b"probe"
#: The results that this process knows. They are plain values, so that a forked process may use them.
_KNOWN: dict[str, Features] = {}


@dataclass(frozen=True)
class Features:
    """The optional features of a server. The worker uses no other optional feature."""

    #: The server compares a body with the SHA-256 in the request, and reports the SHA-256 of each part.
    sha256: bool = False
    #: With If-None-Match, PutObject and CompleteMultipartUpload do not replace an existing object.
    conditional: bool = False
    #: The server copies a range of an object into a part of another, and reports the digest of the copy.
    copies: bool = False

    def __str__(self) -> str:
        checksums = "SHA-256 checksums" if self.sha256 else "no server-side checksums"
        commits = "conditional commits" if self.conditional else "unconditional commits"
        return f"{checksums}, {commits}, {'copies' if self.copies else 'no copies'} between its buckets"


NOTHING_KNOWN = Features()


def known_features(bucket: Bucket, root: str) -> Features:
    """Return the saved features of the bucket's server, or probe it below *root*.

    Without the right to probe, the server has no features. Raises StoreUnavailable.
    """
    id_ = cache_key(bucket)
    found = _KNOWN.get(id_) or _saved(bucket)
    if found is None:
        with bucket.translating(bucket.location):
            try:
                found = probe(bucket, root)
            except ClientError as error:
                if not _is_rejection(error):
                    raise
                found = NOTHING_KNOWN
    _KNOWN[id_] = found
    return found


def probe(bucket: Bucket, root: str) -> Features:
    """Probe the server, and save the result. Raise the SDK's errors."""
    found = _probe_below(bucket, f"{root}{_NAME}-{uuid.uuid4().hex}")
    _KNOWN[cache_key(bucket)] = found
    _save(bucket, found)
    return found


def cache_key(bucket: Bucket) -> str:
    """Return a hash of the bucket's name and account. The account includes the keys, which the hash hides."""
    return hashlib.sha256(repr((bucket.name, *bucket.settings.account)).encode()).hexdigest()[:32]


def _saved(bucket: Bucket) -> Features | None:
    """Return the result that a process of this host has saved within a week."""
    if not bucket.settings.notes_dir:
        return None
    try:
        note = json.loads(Path(bucket.settings.notes_dir, f"{cache_key(bucket)}.json").read_bytes())
        return Features(**note["features"]) if 0 <= time.time() - note["when"] < _VALID_S else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # there is no result, or another version of the worker saved it


def _save(bucket: Bucket, found: Features) -> None:
    """Save the result atomically. If the host cannot save it, its next process probes again."""
    if not bucket.settings.notes_dir:
        return
    path = Path(bucket.settings.notes_dir, f"{cache_key(bucket)}.json")
    part = path.with_suffix(f".{os.getpid()}")
    values = {"bucket": bucket.location, "when": time.time(), "features": dataclasses.asdict(found)}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        give_to_owner(path.parent)
        part.write_text(json.dumps(values) + "\n")
        give_to_owner(part)
        part.replace(path)


def _probe_below(bucket: Bucket, key: str) -> Features:
    name: dict[str, Any] = {"Bucket": bucket.name, "Key": key}
    put = bucket.client.put_object
    try:
        put(**name, Body=_BODY)
        parts = _probe_multipart(bucket, name)
        # rclone accepts a wrong digest and a right one. Other servers, for example Backblaze, accept neither.
        wrong = _status(put, **name, Body=_BODY, ChecksumSHA256=base64_of(hashlib.sha256(b"other").digest()))
        right = _status(put, **name, Body=_BODY, ChecksumSHA256=base64_of(hashlib.sha256(_BODY).digest()))
        conditional = _status(put, **name, Body=_BODY, IfNoneMatch="*") == 412 and parts.conditional
        return Features((wrong, right) == (400, 200), conditional, parts.copies)
    finally:
        # An error here must not hide the result or the error of the probe.
        with contextlib.suppress(*SDK_ERRORS):
            bucket.client.delete_object(**name)


def _probe_multipart(bucket: Bucket, name: dict[str, Any]) -> Features:
    """Return the features of multipart uploads. Some servers support conditions only at PutObject."""
    client = bucket.client
    upload = {**name, "UploadId": client.create_multipart_upload(**name)["UploadId"]}
    try:
        part = client.upload_part(**upload, PartNumber=1, Body=_BODY)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part.get("ETag", "")}]}
        copies = _can_copy(bucket, upload)
        status = _status(client.complete_multipart_upload, **upload, MultipartUpload=parts, IfNoneMatch="*")
    finally:
        with contextlib.suppress(*SDK_ERRORS):
            client.abort_multipart_upload(**upload)
    return Features(conditional=status == 412, copies=copies)


def _can_copy(bucket: Bucket, upload: dict[str, Any]) -> bool:
    """Copy the probe's object into a part, and return whether the part has its MD5. rclone makes an empty part.

    The copy has no range: Amazon copies a range only of an object of more than 5 MB.
    """
    source: Any = {"Bucket": bucket.name, "Key": upload["Key"]}
    try:
        answer = bucket.client.upload_part_copy(**upload, PartNumber=2, CopySource=source)
    except ClientError as error:
        if not _is_rejection(error):
            raise
        return False
    return etag_in(answer.get("CopyPartResult", {})) == hashlib.md5(_BODY, usedforsecurity=False).hexdigest()


def _status(call: Callable[..., Any], **parameters: Any) -> int:
    """Return the status of the answer: 200, or the status of a rejection."""
    try:
        call(**parameters)
    except ClientError as error:
        if not _is_rejection(error):
            raise
        return code_of(error)[1]
    return 200


def _is_rejection(error: ClientError) -> bool:
    """Return whether the server rejects the request. Other errors are temporary."""
    return code_of(error)[1] < 500 or code_of(error)[1] == 501


def base64_of(digest: bytes) -> str:
    """Return a digest in the encoding of S3."""
    return base64.b64encode(digest).decode()
