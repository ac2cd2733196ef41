"""Commit an object to a bucket. A writer that has lost its claim cannot replace the object of a newer writer.

If the server has conditional writes, each object names its writer: the job and the token of its claim. A commit
creates the object, or replaces the object of an older attempt. It never replaces the object of a newer attempt.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from botocore.exceptions import ClientError

from ssvm_worker.errors import Cancelled, ObjectNotFound, StoreDenied, StoreUnavailable
from ssvm_worker.streaming.interfaces import Owner

from .capabilities import NOTHING_KNOWN, Features
from .client import Bucket
from .responses import SDK_ERRORS, code_of, etag_in, is_unclear, translating

#: The metadata of an object that names its writer.
_OWNER = "ssvm-owner"
#: The number of tries of a commit. A try fails if another writer commits between this writer's HEAD and its commit.
_TRIES = 3
#: Seconds before the second HEAD. Each pause doubles.
_PAUSE_S = 0.25
#: The answer to a HEAD.
Head = Mapping[str, Any]


class ObjectName(TypedDict):
    """The name of an object as parameters of the SDK."""

    Bucket: str
    Key: str


@dataclass(frozen=True)
class CommitTarget:
    """The object that a writer will commit."""

    bucket: Bucket
    #: The object's key in the bucket, including the store's prefix.
    path: str
    #: The object's key in the store.
    key: str
    #: Store, key and bucket, for messages.
    location: str
    owner: Owner
    #: Without a probe, the commit uses no optional features of the server.
    features: Features = NOTHING_KNOWN

    @property
    def name(self) -> ObjectName:
        """The object's name for a call of the SDK."""
        return {"Bucket": self.bucket.name, "Key": self.path}

    @property
    def owner_metadata(self) -> dict[str, Any]:
        """The parameter that names the writer. Without conditional writes it has no use, and is empty."""
        return {"Metadata": {_OWNER: f"{self._job}.{self.owner.token}"}} if self.features.conditional else {}

    def commit(self, put: Callable[[dict[str, Any]], str], is_own: Callable[[Head], bool]) -> str:
        """Call *put* with the condition of a safe commit until it succeeds. Return the object's ETag.

        After some errors *put* may have succeeded, and only its answer was lost. Then the function looks at the
        stored object for up to ``late_s`` seconds. *is_own* returns whether *put* has made this object.
        Raises Cancelled if a newer attempt of the same job has committed.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if self.features.conditional else {}
        for _ in range(_TRIES):
            try:
                return put(condition)
            except SDK_ERRORS as error:
                refused = bool(condition) and isinstance(error, ClientError) and code_of(error)[1] in (409, 412)
                found = self._find_after(error, is_own)
                if found and is_own(found):
                    return etag_in(found)
                if not refused:
                    raise
            # An object without an ETag cannot be named in a condition. It does not belong to a newer attempt.
            etag = found.get("ETag") if found else None
            condition = {"IfMatch": etag} if etag else ({} if found else {"IfNoneMatch": "*"})
        what = "Other writers replace the same object all the time"
        raise StoreUnavailable(what, self.location, "Find the other programs that write to the bucket")

    def _find_after(self, error: Exception, is_own: Callable[[Head], bool]) -> Head | None:
        """Return the stored object if the failed commit may have succeeded.

        A lost answer to the first try causes NoSuchUpload (404) at the second. The commit may succeed, or become
        visible, after its error: the connection was silent, or the SDK has repeated the call. Then look repeatedly.
        """
        status = code_of(error)[1] if isinstance(error, ClientError) else 0
        if not is_unclear(error) and status not in (404, 409, 412, 503):
            return None
        answer = error.response.get("ResponseMetadata", {}) if isinstance(error, ClientError) else {}
        is_late = is_unclear(error) or bool(answer.get("RetryAttempts", 0))
        try:
            return self.wait_for(is_own, self.bucket.settings.late_s if is_late else 0.0)
        except (StoreUnavailable, StoreDenied):
            raise error from None  # the first error is more precise

    def wait_for(self, wanted: Callable[[Head], bool], late_s: float) -> Head | None:
        """Return the stored object when *wanted* accepts it, at the latest after *late_s* seconds. None: no object."""
        end, pause = time.monotonic() + late_s, _PAUSE_S
        while True:
            found = self.head()
            left = end - time.monotonic()
            if (found and wanted(found)) or left <= 0:
                return found
            self.bucket.wait(min(pause, left))
            pause *= 2

    def head(self) -> Head | None:
        """Return the answer to a HEAD of the object, or None without an object.

        Raises Cancelled if the object belongs to a newer attempt.
        """
        try:
            with translating(self.location):
                found = self.bucket.client.head_object(**self.name)
        except ObjectNotFound:
            return None
        job, token = writer_of(found)
        if job == self._job and token > self.owner.token:
            raise Cancelled("fenced")
        return found

    def may_be_own(self, found: Head) -> bool:
        """Return whether this job may have written the object. An object without a writer may be any job's."""
        return writer_of(found)[0] in ("", self._job)

    @property
    def _job(self) -> str:
        """A hash of the job id. Metadata cannot hold every job id."""
        return hashlib.sha256(self.owner.job_id.encode()).hexdigest()[:16]


def writer_of(found: Head) -> tuple[str, int]:
    """Return the hashed job and the token of an object's writer. Without this metadata return an empty text and 0."""
    # SeaweedFS and rclone change the case of the name.
    names = {name.lower(): value for name, value in found.get("Metadata", {}).items()}
    job, _, token = names.get(_OWNER, "").partition(".")
    return job, int(token) if token.isdecimal() else 0
