"""The sink of an S3 store: one PUT for a small object, else a multipart upload with several parts in transfer.

Inside one S3 service the server can copy parts itself. The worker then only reads the bytes. For the manifest it needs
the SHA-256 of the whole object. No server has this digest for an object in parts. The server reports the digest of each
copied part. The worker compares it with the bytes that it has read. If the digest differs, or the server cannot copy,
the worker sends the part. So a server-side copy is as safe as an upload.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from botocore.exceptions import ClientError

from ssvm_worker.errors import Cancelled, StoreDenied, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.streaming.interfaces import LeavingAborts, StoredObject
from ssvm_worker.units import MiB

from .capabilities import base64_of
from .commit import CommitTarget, Head
from .multipart import MAX_PARTS, PartBody, UploadedPart, etag_of, part_size, parts_of, take_over
from .responses import etag_in, size_in, time_in, translating, version_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Bytes of chunks that one upload holds, including the part that it fills. A transfer may use 64 MiB. With the queues
#: before the sink, the SDK and its client, benchmarks measured 53 to 61 MiB. This allows four parts of 5 MiB at once.
#: With servers on loopback they are as fast as five.
BUDGET = 27 * MiB
#: The version of a missing object.
_ABSENT = "absent"
#: Seconds that an abort waits for parts in transfer. The sweep removes later parts. A cancel takes at most 2 seconds.
_ABORT_WAIT_S = 1.0


@dataclass
class PartCopier:
    """Copies ranges of one object into parts of another inside one S3 service. For one transfer. Thread-safe."""

    bucket: str
    #: The source object's key in the bucket.
    path: str
    #: Whether all copies so far have succeeded.
    works: bool = True
    #: Whether a copy differed from the bytes that the worker has read.
    mismatched: bool = False

    def copy(self, target: CommitTarget, upload: dict[str, Any], begin: int, body: PartBody) -> UploadedPart | None:
        """Copy the bytes of *body* from offset *begin*. Return None if the worker must send them."""
        if not self.works or not body.size:
            return None
        try:
            answer = target.bucket.client.upload_part_copy(
                **target.name,
                **upload,
                CopySource={"Bucket": self.bucket, "Key": self.path},
                CopySourceRange=f"bytes={begin}-{begin + body.size - 1}",
            ).get("CopyPartResult", {})
        except ClientError:
            self.works = False  # many servers cannot copy; the upload of the part reports an important error again
            return None
        part = UploadedPart(body.size, etag_in(answer), answer.get("ChecksumSHA256", ""))
        if not part.has(body):
            self.works, self.mismatched = False, True
            return None
        return part


class S3Sink(LeavingAborts):
    """See Sink. Holds BUDGET bytes of chunks (see part_size). The first error is final: all later calls raise it again.

    Parts cannot be read back. So a resumed sink takes all bytes again. It compares the digest of each part of an
    earlier attempt with the bytes, and sends only the missing parts.
    """

    offset = 0

    def __init__(
        self,
        target: CommitTarget,
        size_hint: int | None,
        uploads: dict[str, str],
        *,
        resume: bool = False,
        copier: PartCopier | None = None,
    ) -> None:
        """*uploads* gets the job of each open upload id. *copier* copies parts that the server already has."""
        settings = target.bucket.settings
        self.key = target.key
        self._target = target
        self._size_hint = size_hint
        self._uploads = uploads
        self._resume = resume
        self._copier = copier
        self._upload_id = ""
        self._part_size = part_size(1, settings.part_size, size_hint, 0)
        self._pieces: list[memoryview] = []
        self._held = 0
        self._size = 0
        #: Bytes of the parts so far.
        self._sent = 0
        #: The parts of an earlier attempt, by number.
        self._earlier: dict[int, UploadedPart] = {}
        #: The version of the object before the commit, if the keys allow a HEAD.
        self._version_before: str | None = None
        #: Whether a part of the upload has other bytes than this attempt. Then the upload is useless.
        self._differs = False
        self._parts: dict[int, UploadedPart] = {}
        self._running: dict[Future[UploadedPart], int] = {}
        self._threads = ThreadPoolExecutor(settings.parallel, "s3-part")
        self._failed: WorkerError | None = None
        self._ended = False
        #: Guards *_ended*: another thread than the blocked one may abort.
        self._ending = threading.Lock()

    def write(self, chunk: bytes) -> None:
        """See Sink. Wait while the memory budget is used. Raise the error of an earlier part."""
        with self._keeping_first_error():
            self._collect(self._target.bucket.settings.parallel)
            rest = memoryview(chunk)
            while rest:
                piece = rest[: self._part_size - self._held]
                rest = rest[len(piece) :]
                self._pieces.append(piece)
                self._held += len(piece)
                if self._held == self._part_size:
                    self._send_part()
            self._size += len(chunk)

    def resumed(self) -> Iterator[bytes]:
        """Return an empty iterator, because parts cannot be read."""
        return iter(())

    def commit(self) -> StoredObject:
        """See Sink. Raise StoreUnavailable if another process has ended the upload.

        Raises Cancelled if a newer attempt has committed.
        """
        with self._keeping_first_error():
            if not self._upload_id:
                etag = self._put_object()
            else:
                if self._pieces:
                    self._send_part()
                self._collect(0)
                etag = self._complete()
            stored = self._read_back(etag)
        self._end()
        return stored

    def abort(self) -> None:
        """See Sink. If the abort fails, the sweep removes the upload: an abort must not hide an earlier error."""
        if self._end() and self._upload_id:
            bucket = self._target.bucket
            with bucket.cleaning(), contextlib.suppress(WorkerError), translating(self._target.location):
                self._client.abort_multipart_upload(**self._target.name, UploadId=self._upload_id)

    def suspend(self) -> None:
        """See Sink. The sent parts stay. If a part differs from the object, the sink aborts."""
        if not self._upload_id or self._differs:
            self.abort()
        elif self._end():
            self._uploads[self._upload_id] = self._target.owner.job_id

    @contextlib.contextmanager
    def _keeping_first_error(self) -> Iterator[None]:
        """Raise the first error again, or translate and keep an error of the block."""
        if self._failed:
            raise self._failed
        try:
            with self._target.bucket.translating(self._target.location):
                yield
        except WorkerError as error:
            self._failed = error
            raise

    @property
    def _client(self) -> S3Client:
        return self._target.bucket.client

    @property
    def _by_sha256(self) -> bool:
        return self._target.features.sha256

    def _take_body(self) -> PartBody:
        body = PartBody(self._pieces, lambda: not self._ended)
        self._pieces, self._held = [], 0
        return body

    def _digest(self, body: PartBody) -> str:
        """Return the digest that the server compares. It is empty if the server does not compare."""
        return base64_of(body.sha256) if self._by_sha256 else ""

    def _put_object(self) -> str:
        body = self._take_body()
        parameters = {**self._target.name, **self._target.owner_metadata, **_checksum(self._digest(body))}
        # With conditional writes, the commit repeats the PUT if the stored object's ETag is not an MD5.
        before = self._version_before = None if self._target.features.conditional else self._read_version()

        def put(condition: dict[str, Any]) -> str:
            body.seek(0)
            return etag_in(self._client.put_object(**parameters, **condition, Body=cast("Any", body)))

        def is_own(found: Head) -> bool:
            is_new = before is not None and version_of(found) != before
            return found.get("ContentLength") == body.size and (is_new or etag_in(found) == body.md5.hex())

        return self._target.commit(put, is_own)

    def _send_part(self) -> None:
        if not self._upload_id:
            self._begin()
        number = len(self._parts) + len(self._running) + 1
        if number > MAX_PARTS:
            what = f"The object needs more than {MAX_PARTS} parts, the limit of S3"
            raise StoreFull(what, self._target.location, "Upload it with its size")
        body = self._take_body()
        self._running[self._threads.submit(self._upload, number, self._sent, body)] = number
        self._sent += body.size
        # Wait here, so that the parts in transfer and the next part do not exceed the budget.
        settings = self._target.bucket.settings
        self._collect(min(max(0, BUDGET // self._part_size - 1), settings.parallel))
        self._part_size = part_size(number + 1, settings.part_size, self._size_hint, self._size)

    def _begin(self) -> None:
        """Take over the upload of an earlier attempt for this object, or create an upload."""
        if self._resume:
            self._upload_id, self._earlier = take_over(self._target.bucket, self._target.path)
        if not self._upload_id:
            checksum: Any = {"ChecksumAlgorithm": "SHA256"} if self._by_sha256 else {}
            parameters = {**self._target.name, **self._target.owner_metadata, **checksum}
            self._upload_id = self._client.create_multipart_upload(**parameters)["UploadId"]
            if self._ended:  # by an abort in another thread, which did not know this upload
                with self._target.bucket.cleaning():
                    self._client.abort_multipart_upload(**self._target.name, UploadId=self._upload_id)
                raise Cancelled("shutdown")
        self._uploads[self._upload_id] = self._target.owner.job_id

    def _upload(self, number: int, begin: int, body: PartBody) -> UploadedPart:
        """Reuse, copy or send a part."""
        if earlier := self._earlier.pop(number, None):
            if earlier.has(body):
                return replace(earlier, sha256=self._digest(body))  # SeaweedFS omits it in lists, but needs it later
            self._differs = True
        upload = {"UploadId": self._upload_id, "PartNumber": number}
        with self._target.bucket.translating(self._target.location):
            if self._copier:
                if copied := self._copier.copy(self._target, upload, begin, body):
                    return copied
                self._differs |= self._copier.mismatched
            digest = self._digest(body)
            parameters = {**self._target.name, **upload, **_checksum(digest)}
            answer = self._client.upload_part(**parameters, Body=cast("Any", body))
            return UploadedPart(body.size, etag_in(answer), digest)

    def _collect(self, max_running: int) -> None:
        """Take the finished parts, and wait until at most *max_running* parts are in transfer."""
        while True:
            for each in [each for each in self._running if each.done()]:
                self._parts[self._running.pop(each)] = each.result()
            if len(self._running) <= max_running:
                return
            wait(self._running, return_when=FIRST_COMPLETED)

    def _complete(self) -> str:
        parts = self._parts_with_etags()
        self._check_size(sum(part.size for part in parts))
        # Only one job at a time writes a key. So an object that appears during the commit is this job's.
        before = self._version_before = self._read_version()
        etag = etag_of([part.etag for part in parts])
        listed = [
            {"PartNumber": number, "ETag": f'"{part.etag}"', **_checksum(part.sha256)}
            for number, part in enumerate(parts, 1)
        ]
        upload: Any = {"UploadId": self._upload_id, "MultipartUpload": {"Parts": listed}}
        size: dict[str, Any] = {"MpuObjectSize": self._size} if self._by_sha256 else {}

        def complete(condition: dict[str, Any]) -> str:
            return etag_in(self._client.complete_multipart_upload(**self._target.name, **upload, **size, **condition))

        def is_own(found: Head) -> bool:
            if found.get("ContentLength") != self._size or not self._target.may_be_own(found):
                return False
            return etag_in(found) == etag or (before is not None and version_of(found) != before)

        return self._target.commit(complete, is_own)

    def _read_version(self) -> str | None:
        """Return the version of the stored object before the commit. None: the keys do not allow a HEAD."""
        try:
            found = self._target.head()
        except StoreDenied:
            return None
        return version_of(found) if found else _ABSENT

    def _parts_with_etags(self) -> list[UploadedPart]:
        """Return the parts in order. Some proxies omit ETags in answers; the server's list of parts has them."""
        if not all(part.etag for part in self._parts.values()):
            upload: Any = {"Key": self._target.path, "UploadId": self._upload_id}
            listed = dict(parts_of(self._target.bucket, upload))
            for number, part in self._parts.items():
                same = number in listed and listed[number].size == part.size
                self._parts[number] = part if part.etag or not same else replace(part, etag=listed[number].etag)
        if missing := [number for number, part in self._parts.items() if not part.etag]:
            what = f"The store sends no ETag of part {missing[0]}, neither in its answer nor in its list of parts"
            raise StoreDenied(what, self._target.location, "Check the service, and the proxies in front of it")
        return [self._parts[number] for number in sorted(self._parts)]

    def _read_back(self, etag: str) -> StoredObject:
        """Return the stored object. For some time the store may show no object, or the previous object.

        Some stores show another ETag than they returned. Then any version after the previous version is this object.
        """
        before = self._version_before

        def is_new(found: Head) -> bool:
            same = not etag or not etag_in(found) or etag_in(found) == etag
            replaced = before is not None and version_of(found) != before
            return (same or replaced) and found.get("ContentLength", self._size) == self._size

        found = self._target.wait_for(is_new, self._target.bucket.settings.late_s)
        if found is None:
            what = "The store has accepted the object, but does not show it"
            raise StoreUnavailable(what, self._target.location, "Retry")
        self._check_size(size_in(found, self._target.location))
        return StoredObject(self.key, self._size, modified=time_in(found))

    def _check_size(self, found: int) -> None:
        if found != self._size:
            what = f"The store has {found} bytes of the {self._size} written"
            raise StoreUnavailable(what, self._target.location, "Retry")

    def _end(self) -> bool:
        """End the sink: parts in transfer stop at their next piece. Return False if the sink had ended before."""
        with self._ending:
            if self._ended:
                return False
            self._ended = True
        self._uploads.pop(self._upload_id, None)
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(list(self._running), timeout=_ABORT_WAIT_S)
        self._pieces.clear()
        return True


def _checksum(digest: str) -> Any:
    return {"ChecksumSHA256": digest} if digest else {}
