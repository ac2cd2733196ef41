"""Where an object will lie in a bucket, and how it is committed there so that a fenced-off writer replaces nothing.

Where the server has conditional writes, each object names its writer: the job, and the token of its claim. A commit
creates the object, or replaces that of an older attempt; it never replaces what a newer attempt of its job has stored.
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
from .errors import SDK_ERRORS, code_of, is_unclear, translating
from .responses import etag_in

#: The object's metadata that names its writer.
_OWNER = "ssvm-owner"
#: How often others may commit between our look and our commit, before the attempt fails.
_TRIES = 3


#: Seconds before the second look; the pauses double.
_PAUSE_S = 0.25
#: What a HEAD tells.
Seen = Mapping[str, Any]


class ObjectName(TypedDict):
    """How the SDK names an object."""

    Bucket: str
    Key: str


@dataclass(frozen=True)
class CommitTarget:
    """One object that is to be."""

    bucket: Bucket
    #: In the bucket, below the store's prefix.
    path: str
    #: As the store's users say it.
    key: str
    #: For messages.
    where: str
    owner: Owner
    #: Nothing is asked of a server that nobody has probed.
    features: Features = NOTHING_KNOWN

    @property
    def place(self) -> ObjectName:
        """The object, for a call of the SDK."""
        return {"Bucket": self.bucket.name, "Key": self.path}

    @property
    def signed(self) -> dict[str, Any]:
        """What a call that makes the object says of its writer; nothing where it would serve nobody."""
        return {"Metadata": {_OWNER: f"{self._job}.{self.owner.token}"}} if self.features.conditional else {}

    def settle(self, commit: Callable[[dict[str, Any]], str], stands: Callable[[Seen], bool]) -> str:
        """Call *commit* with the condition under which it may take effect, until it does; return the object's ETag.

        *stands* tells whether the object that is there is what *commit* makes: our own, whose answer was lost. That is
        asked after an error that leaves this open, for ``late_s`` seconds.
        Raises Cancelled if a newer attempt of the same job was quicker.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if self.features.conditional else {}
        for _ in range(_TRIES):
            try:
                return commit(condition)
            except SDK_ERRORS as error:
                refused = bool(condition) and isinstance(error, ClientError) and code_of(error)[1] in (409, 412)
                seen = self._late(stands, error)
                if seen and stands(seen):
                    return etag_in(seen)
                if not refused:
                    raise
            # An object without an ETag can only be replaced unseen; it is not a newer attempt's.
            etag = seen.get("ETag") if seen else None
            condition = {"IfMatch": etag} if etag else ({} if seen else {"IfNoneMatch": "*"})
        raise StoreUnavailable("Others write the same object all the time", self.where, "See what else writes there")

    def _late(self, stands: Callable[[Seen], bool], error: Exception) -> Seen | None:
        """Look what is there after a commit has failed with *error*; again and again where it may have taken effect."""
        if not may_have_taken_effect(error):
            return None
        try:
            return self.seen_late(stands, self.bucket.settings.late_s if is_late(error) else 0.0)
        except (StoreUnavailable, StoreDenied):
            raise error from None  # it says more than that we cannot look

    def seen_late(self, wanted: Callable[[Seen], bool], late_s: float) -> Seen | None:
        """Return what is there as soon as it is *wanted*, or what is there after *late_s* seconds; None: nothing."""
        end, pause = time.monotonic() + late_s, _PAUSE_S
        while True:
            found = self.look()
            left = end - time.monotonic()
            if (found and wanted(found)) or left <= 0:
                return found
            self.bucket.wait(min(pause, left))
            pause *= 2

    def look(self) -> Seen | None:
        """Return what a HEAD of the object tells; None if there is none. Cancelled if it is a newer attempt's."""
        try:
            with translating(self.where):
                seen = self.bucket.client.head_object(**self.place)
        except ObjectNotFound:
            return None
        job, token = writer_of(seen)
        if job == self._job and token > self.owner.token:
            raise Cancelled("fenced")
        return seen

    def may_be_ours(self, seen: Seen) -> bool:
        """Tell whether nothing says that another job has written it."""
        return writer_of(seen)[0] in ("", self._job)

    @property
    def _job(self) -> str:
        """Any job id, as metadata can hold it."""
        return hashlib.sha256(self.owner.job_id.encode()).hexdigest()[:16]


def writer_of(seen: Seen) -> tuple[str, int]:
    """Return the job, as its metadata has it, and the token of an object's writer; empty and 0 where nothing tells."""
    # SeaweedFS and rclone change the case of the name.
    names = {name.lower(): value for name, value in seen.get("Metadata", {}).items()}
    job, _, token = names.get(_OWNER, "").partition(".")
    return job, int(token) if token.isdecimal() else 0


def may_have_taken_effect(error: Exception) -> bool:
    """Tell whether a commit that failed so may stand; after NoSuchUpload by a first try whose answer was lost."""
    return is_unclear(error) or (isinstance(error, ClientError) and code_of(error)[1] in (404, 409, 412, 503))


def is_late(error: Exception) -> bool:
    """Tell whether it may still take effect, or not show yet: we have been silent for long, or have tried again."""
    tries = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) if isinstance(error, ClientError) else 0
    return is_unclear(error) or bool(tries)
