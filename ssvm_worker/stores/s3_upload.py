"""The sink of an S3 store: one PUT for a small object, else a multipart upload with several parts under way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from botocore.exceptions import BotoCoreError, ClientError

from ssvm_worker.errors import Cancelled, ObjectNotFound, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.stream import StoredObject
from ssvm_worker.units import MiB

from .s3_errors import translating
from .s3_features import base64_of
from .s3_parts import MAX_PARTS, Body, Part, etag_of, part_size, take_over
from .s3_target import Target
from .sink import LeavingAborts

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

    from .s3_copy import PartCopier

#: Bytes of chunks that one upload holds, the part that is being filled included. 64 MiB in all are promised for a
#: transfer; with the queues before the sink and the SDK, its client included, 60 to 62 were measured (tests/bench).
BUDGET = 32 * MiB
#: Seconds that an abort waits for parts under way; one that ends later is left to the sweep.
_PATIENCE_S = 10


class S3Sink(LeavingAborts):
    """See Sink; holds BUDGET bytes of chunks (see part_size). The first error is raised again by all that follows.

    Parts cannot be read back, so one that resumes takes all bytes again. It compares each part that an earlier attempt
    has sent with the bytes that come, by their digest, and sends only what is not there.
    """

    offset = 0

    def __init__(
        self,
        target: Target,
        size_hint: int | None,
        uploads: dict[str, str],
        *,
        resume: bool = False,
        copier: PartCopier | None = None,
    ) -> None:
        """*uploads* is told the job of every upload id that is open; *copier* spares sending what the server has."""
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
        #: Bytes that parts were made of.
        self._sent = 0
        #: What an earlier attempt has sent, by number.
        self._there: dict[int, Part] = {}
        #: Whether any of that was something else: then it is of no use to anybody.
        self._differs = False
        self._parts: dict[int, Part] = {}
        self._running: dict[Future[Part], int] = {}
        self._threads = ThreadPoolExecutor(settings.parallel, "s3-part")
        self._failed: WorkerError | None = None
        self._ended = False

    def write(self, chunk: bytes) -> None:
        """See Sink. Waits while as many parts are under way as memory allows; raises what an earlier part met."""
        with self._once_failed_for_ever():
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
        """See Sink: nothing, as parts cannot be read."""
        return iter(())

    def commit(self) -> StoredObject:
        """See Sink. Cancelled when somebody has aborted the upload meanwhile, or a newer attempt has committed."""
        with self._once_failed_for_ever():
            if not self._upload_id:
                self._put_whole()
            else:
                if self._pieces:
                    self._send_part()
                self._collect(0)
                self._complete()
            stored = self._read_back()
        self._end()
        return stored

    def abort(self) -> None:
        """See Sink. What cannot be aborted now is left to the sweep: an abort must not hide the error before it."""
        if self._ended:
            return
        self._end()
        if self._upload_id:
            with contextlib.suppress(BotoCoreError, ClientError):
                self._client.abort_multipart_upload(**self._target.place, UploadId=self._upload_id)

    def suspend(self) -> None:
        """See Sink: the parts that have been sent stay. Those that turned out to be something else do not."""
        if not self._upload_id or self._differs:
            self.abort()
        elif not self._ended:
            job_id = self._uploads[self._upload_id]
            self._end()
            self._uploads[self._upload_id] = job_id

    @contextlib.contextmanager
    def _once_failed_for_ever(self) -> Iterator[None]:
        if self._failed:
            raise self._failed
        try:
            with translating(self._target.where):
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

    def _take_body(self) -> Body:
        body = Body(self._pieces, lambda: not self._ended)
        self._pieces, self._held = [], 0
        return body

    def _digest(self, body: Body) -> str:
        """What the server shall compare; empty where it does not."""
        return base64_of(body.sha256) if self._by_sha256 else ""

    def _put_whole(self) -> None:
        body = self._take_body()
        asked = {**self._target.place, **self._target.signed, **_checksum(self._digest(body))}

        def put(condition: dict[str, Any]) -> None:
            body.seek(0)
            self._client.put_object(**asked, **condition, Body=cast("Any", body))

        self._target.settle(put)

    def _send_part(self) -> None:
        if not self._upload_id:
            self._begin()
        number = len(self._parts) + len(self._running) + 1
        if number > MAX_PARTS:
            raise StoreFull("The object has more parts than S3 takes", self._target.where, "Send its size with it")
        body = self._take_body()
        self._running[self._threads.submit(self._upload, number, self._sent, body)] = number
        self._sent += body.size
        # Wait here, so that what is under way and the next part together stay within the budget.
        at_once = max(0, BUDGET // self._part_size - 1)
        self._collect(min(at_once, self._target.bucket.settings.parallel))
        least = self._target.bucket.settings.part_size
        self._part_size = part_size(number + 1, least, self._size_hint, self._size)

    def _begin(self) -> None:
        """Take over what an earlier attempt has sent of this very object, or open an upload."""
        if self._resume:
            self._upload_id, self._there = take_over(self._target.bucket, self._target.path)
        if not self._upload_id:
            checksum: Any = {"ChecksumAlgorithm": "SHA256"} if self._by_sha256 else {}
            asked = {**self._target.place, **self._target.signed, **checksum}
            self._upload_id = self._client.create_multipart_upload(**asked)["UploadId"]
        self._uploads[self._upload_id] = self._target.owner.job_id

    def _upload(self, number: int, begin: int, body: Body) -> Part:
        if there := self._there.pop(number, None):
            if there.has(body):
                return replace(there, sha256=self._digest(body))  # SeaweedFS does not list it, but wants it at the end
            self._differs = True
        upload = {"UploadId": self._upload_id, "PartNumber": number}
        with translating(self._target.where):
            if self._copier:
                if copied := self._copier.copy(self._target, upload, begin, body):
                    return copied
                self._differs |= self._copier.lied
            return self._send(upload, body)

    def _send(self, upload: dict[str, Any], body: Body) -> Part:
        digest = self._digest(body)
        answer = self._client.upload_part(**self._target.place, **upload, **_checksum(digest), Body=cast("Any", body))
        return Part(body.size, answer["ETag"].strip('"'), digest)

    def _collect(self, most: int) -> None:
        """Take the answers that are there, and wait until *most* parts are under way."""
        while True:
            for each in [each for each in self._running if each.done()]:
                self._parts[self._running.pop(each)] = each.result()
            if len(self._running) <= most:
                return
            wait(self._running, return_when=FIRST_COMPLETED)

    def _complete(self) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        self._refuse_other_size(sum(part.size for part in parts))
        etag = etag_of([part.etag for part in parts])
        listed = [_listed(number, part) for number, part in enumerate(parts, 1)]
        size: dict[str, Any] = {"MpuObjectSize": self._size} if self._by_sha256 else {}

        def complete(condition: dict[str, Any]) -> None:
            upload: Any = {"UploadId": self._upload_id, "MultipartUpload": {"Parts": listed}}
            self._client.complete_multipart_upload(**self._target.place, **upload, **size, **condition)

        try:
            with translating(self._target.where):
                self._target.settle(complete, lambda seen: seen == etag)
        except Cancelled:
            # No such upload: swept, or completed by a first try whose answer was lost.
            if self._etag_there() != etag:
                raise

    def _etag_there(self) -> str | None:
        """That of the object which stands there, if one does."""
        try:
            with translating(self._target.where):
                return self._client.head_object(**self._target.place)["ETag"].strip('"')
        except ObjectNotFound:
            return None

    def _read_back(self) -> StoredObject:
        seen = self._client.head_object(**self._target.place)
        self._refuse_other_size(seen["ContentLength"])
        return StoredObject(self.key, self._size, when=seen["LastModified"].timestamp())

    def _refuse_other_size(self, found: int) -> None:
        if found != self._size:
            what = f"The store has {found} bytes of the {self._size} written"
            raise StoreUnavailable(what, self._target.where, "Try again")

    def _end(self) -> None:
        """Let go of the parts under way: they stop at their next piece."""
        self._ended = True
        self._uploads.pop(self._upload_id, None)
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(self._running, timeout=_PATIENCE_S)
        self._pieces.clear()


def _listed(number: int, part: Part) -> CompletedPartTypeDef:
    told: CompletedPartTypeDef = {"PartNumber": number, "ETag": f'"{part.etag}"'}
    told.update(_checksum(part.sha256))
    return told


def _checksum(digest: str) -> Any:
    return {"ChecksumSHA256": digest} if digest else {}
