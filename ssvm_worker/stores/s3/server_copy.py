"""A copy inside one S3 service: the server copies each part, and what it has copied is compared with what we have read.

The bytes are read once, for the manifest's SHA-256 of the whole, which no server can tell of an object in parts. They
are not sent. The server answers with the digest of each part that it has copied; a part whose digest is another, or
that the server cannot copy, is sent, as it is at hand: so a copy is never less sure than a transfer, only cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from .commit import CommitTarget
from .multipart import PartBody, UploadedPart
from .responses import etag_in


@dataclass
class PartCopier:
    """Copies ranges of one object into the parts of another. Of one transfer; safe in several threads."""

    bucket: str
    #: Of the object in that bucket.
    path: str
    #: Whether the server has copied all that it was asked for so far.
    able: bool = True
    #: Whether it said that it had, and had not.
    lied: bool = False

    def copy(self, target: CommitTarget, upload: dict[str, Any], begin: int, body: PartBody) -> UploadedPart | None:
        """Have the range from *begin* on copied, which holds the bytes of *body*; None if they must be sent."""
        if not self.able or not body.size:
            return None
        try:
            answer = target.bucket.client.upload_part_copy(
                **target.place,
                **upload,
                CopySource={"Bucket": self.bucket, "Key": self.path},
                CopySourceRange=f"bytes={begin}-{begin + body.size - 1}",
            ).get("CopyPartResult", {})
        except ClientError:
            self.able = False  # many servers cannot; the reason that matters will come when the part is sent
            return None
        part = UploadedPart(body.size, etag_in(answer), answer.get("ChecksumSHA256", ""))
        if not part.has(body):
            self.able, self.lied = False, True
            return None
        return part
