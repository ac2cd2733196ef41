"""What an S3 server can do beyond the least: probed once with tiny objects, and remembered by this host.

Servers say little of themselves and ignore what they do not know, so each feature counts only when the server has been
seen to refuse what it must refuse: other bytes than their digest tells, and a second object under a key that is taken.
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

from .errors import SDK_ERRORS, code_of
from .responses import etag_in

if TYPE_CHECKING:
    from .client import Bucket

#: What the probe's object begins with: hidden, so that no listing ever shows it.
_NAME = ".ssvm-probe"
#: A server that was replaced or updated is looked at anew within a week; `ssvm doctor` does so at once.
_KEEP_S = 7 * 24 * 3600
_BODY = b"probe"
#: What this process knows. Plain values, so that a fork may have them too.
_KNOWN: dict[str, Features] = {}


@dataclass(frozen=True)
class Features:
    """Nothing is asked of a server beyond what these tell."""

    #: It compares what comes with a SHA-256 that comes along, and tells that of each part.
    sha256: bool = False
    #: If-None-Match keeps PutObject and CompleteMultipartUpload from replacing what somebody else has stored.
    conditional: bool = False
    #: It copies a range of an object into a part of another, and tells the digest of what it copied.
    copies: bool = False

    def __str__(self) -> str:
        checksums = "SHA-256 checksums" if self.sha256 else "no checksums of its own"
        commits = "conditional commits" if self.conditional else "unconditional commits"
        return f"{checksums}, {commits}, {'copies' if self.copies else 'no copies'} between its buckets"


NOTHING_KNOWN = Features()


def known_features(bucket: Bucket, root: str) -> Features:
    """What the server of that bucket can do, as remembered, or probed now below *root*.

    Where we may not try it out, nothing is taken for granted. Raises StoreUnavailable.
    """
    name = _name(bucket)
    if name not in _KNOWN:
        _KNOWN[name] = _noted(bucket) or _probed(bucket, root)
    return _KNOWN[name]


def probe(bucket: Bucket, root: str) -> Features:
    """Try out what the server does, and remember it. Raises the SDK's errors."""
    found = _tried(bucket, f"{root}{_NAME}-{uuid.uuid4().hex}")
    _KNOWN[_name(bucket)] = found
    _note(bucket, found)
    return found


def _probed(bucket: Bucket, root: str) -> Features:
    with bucket.translating(bucket.place):
        try:
            return probe(bucket, root)
        except ClientError as error:
            if not _refused(error):
                raise
            return NOTHING_KNOWN


def _name(bucket: Bucket) -> str:
    """Of all that may make a difference, the keys included, which a note does not show."""
    return hashlib.sha256(repr((bucket.name, *bucket.settings.account)).encode()).hexdigest()[:32]


def _noted(bucket: Bucket) -> Features | None:
    """What a process of this host has noted within a week."""
    if not bucket.settings.notes_dir:
        return None
    try:
        note = json.loads(Path(bucket.settings.notes_dir, f"{_name(bucket)}.json").read_bytes())
        return Features(**note["features"]) if 0 <= time.time() - note["when"] < _KEEP_S else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # none, or not of this version


def _note(bucket: Bucket, found: Features) -> None:
    """Whole or not at all; a host that cannot keep it asks again in its next process."""
    if not bucket.settings.notes_dir:
        return
    path = Path(bucket.settings.notes_dir, f"{_name(bucket)}.json")
    part = path.with_suffix(f".{os.getpid()}")
    values = {"bucket": bucket.place, "when": time.time(), "features": dataclasses.asdict(found)}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(values) + "\n")
        part.replace(path)


def _tried(bucket: Bucket, key: str) -> Features:
    place: dict[str, Any] = {"Bucket": bucket.name, "Key": key}
    try:
        bucket.client.put_object(**place, Body=_BODY)
        parts = _parts_of_the_probe(bucket, place)
        return Features(_compares(bucket, place), _refuses(bucket, place) and parts.conditional, parts.copies)
    finally:
        # What fails here must not hide what the probe has found, or why it failed.
        with contextlib.suppress(*SDK_ERRORS):
            bucket.client.delete_object(**place)


def _compares(bucket: Bucket, place: dict[str, Any]) -> bool:
    """A wrong digest must be refused and a right one be taken: rclone takes both, others (Backblaze) neither."""
    put = bucket.client.put_object
    wrong = _status(put, **place, Body=_BODY, ChecksumSHA256=base64_of(hashlib.sha256(b"other").digest()))
    right = _status(put, **place, Body=_BODY, ChecksumSHA256=base64_of(hashlib.sha256(_BODY).digest()))
    return (wrong, right) == (400, 200)


def _refuses(bucket: Bucket, place: dict[str, Any]) -> bool:
    return _status(bucket.client.put_object, **place, Body=_BODY, IfNoneMatch="*") == 412


def _parts_of_the_probe(bucket: Bucket, place: dict[str, Any]) -> Features:
    """What it does of multipart uploads, which is apart: some honour a condition at PutObject only."""
    client = bucket.client
    upload = {**place, "UploadId": client.create_multipart_upload(**place)["UploadId"]}
    try:
        part = client.upload_part(**upload, PartNumber=1, Body=_BODY)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part.get("ETag", "")}]}
        copies = _copies(bucket, upload)
        status = _status(client.complete_multipart_upload, **upload, MultipartUpload=parts, IfNoneMatch="*")
    finally:
        with contextlib.suppress(*SDK_ERRORS):
            client.abort_multipart_upload(**upload)
    return Features(conditional=status == 412, copies=copies)


def _copies(bucket: Bucket, upload: dict[str, Any]) -> bool:
    """Whether the probe's own object becomes a part with its MD5; rclone makes an empty one.

    All of it: Amazon copies a range only of an object of more than 5 MB.
    """
    source: Any = {"Bucket": bucket.name, "Key": upload["Key"]}
    try:
        answer = bucket.client.upload_part_copy(**upload, PartNumber=2, CopySource=source)
    except ClientError as error:
        if not _refused(error):
            raise
        return False
    return etag_in(answer.get("CopyPartResult", {})) == hashlib.md5(_BODY, usedforsecurity=False).hexdigest()


def _status(call: Callable[..., Any], **asked: Any) -> int:
    """What the server answers: 200, or how it refuses the request."""
    try:
        call(**asked)
    except ClientError as error:
        if not _refused(error):
            raise
        return code_of(error)[1]
    return 200


def _refused(error: ClientError) -> bool:
    """Whether it says something of the request, and not of the moment."""
    return code_of(error)[1] < 500 or code_of(error)[1] == 501


def base64_of(digest: bytes) -> str:
    """A digest as S3 writes it."""
    return base64.b64encode(digest).decode()
