"""Where an object will lie in a bucket, and how it is committed there so that a fenced-off writer replaces nothing.

Where the server has conditional writes, each object names its writer: the job, and the token of its claim. A commit
creates the object, or replaces that of an older attempt; it never replaces what a newer attempt of its job has stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

from botocore.exceptions import ClientError

from ssvm_worker.errors import Cancelled, StoreUnavailable
from ssvm_worker.stream import Owner

from .s3_bucket import Bucket
from .s3_errors import code_of
from .s3_features import NOTHING_KNOWN, Features

#: The object's metadata that names its writer.
_OWNER = "ssvm-owner"
#: How often others may commit between our look and our commit, before the attempt fails.
_TRIES = 3


class Place(TypedDict):
    """How the SDK names an object."""

    Bucket: str
    Key: str


@dataclass(frozen=True)
class Target:
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
    def place(self) -> Place:
        """The object, for a call of the SDK."""
        return {"Bucket": self.bucket.name, "Key": self.path}

    @property
    def signed(self) -> dict[str, Any]:
        """What a call that makes the object says of its writer; nothing where it would serve nobody."""
        return {"Metadata": {_OWNER: f"{self._job}.{self.owner.token}"}} if self.features.conditional else {}

    def settle(self, commit: Callable[[dict[str, Any]], Any], stands: Callable[[str], bool] = lambda _: False) -> None:
        """Call *commit* with the condition under which it may take effect, until it does.

        *stands* tells by its ETag whether the object that is there is ours: our own commit, whose answer was lost.
        Raises Cancelled if a newer attempt of the same job was quicker.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if self.features.conditional else {}
        for _ in range(_TRIES):
            try:
                commit(condition)
                return
            except ClientError as error:
                if not condition or code_of(error)[1] != 412:
                    raise
            etag = self._replaceable()
            if etag and stands(etag.strip('"')):
                return
            condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        raise StoreUnavailable("Others write the same object all the time", self.where, "See what else writes there")

    @property
    def _job(self) -> str:
        """Any job id, as metadata can hold it."""
        return hashlib.sha256(self.owner.job_id.encode()).hexdigest()[:16]

    def _replaceable(self) -> str:
        """The ETag of the object that is there, or nothing; Cancelled if it is a newer attempt's."""
        try:
            seen = self.bucket.client.head_object(**self.place)
        except ClientError as error:
            if code_of(error)[1] == 404:
                return ""
            raise
        # SeaweedFS and rclone change the case of the name.
        names = {name.lower(): value for name, value in seen["Metadata"].items()}
        job, _, token = names.get(_OWNER, "").partition(".")
        if job == self._job and token.isdecimal() and int(token) > self.owner.token:
            raise Cancelled("fenced")
        return seen["ETag"]
