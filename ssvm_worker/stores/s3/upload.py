"""The sink of an S3 store: one PUT for a small object, else a multipart upload with several parts under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ssvm_worker.errors import Cancelled, StoreDenied, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.streaming.interfaces import LeavingAborts, StoredObject
from ssvm_worker.units import MiB

from .capabilities import base64_of
from .commit import CommitTarget, Seen
from .errors import translating
from .multipart import MAX_PARTS, PartBody, UploadedPart, etag_of, part_size, parts_of, take_over
from .responses import etag_in, size_in, time_in, version_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

    from .server_copy import PartCopier

#: Bytes of chunks that one upload holds, the part that is being filled included. 64 MiB in all are promised for a
#: transfer; with the queues before the sink and the SDK, its client included, 60 to 62 were measured (benchmarks).
BUDGET = 32 * MiB
#: The version of an object that is not there.
_ABSENT = "absent"
#: Seconds that an abort waits for parts under way; one that ends later is left to the sweep. A cancel takes 2 at most.
_PATIENCE_S = 1.0


class S3Sink(LeavingAborts):
    """See Sink; holds BUDGET bytes of chunks (see part_size). The first error is raised again by all that follows.

    Parts cannot be read back, so one that resumes takes all bytes again. It compares each part that an earlier attempt
    has sent with the bytes that come, by their digest, and sends only what is not there.
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
        self._there: dict[int, UploadedPart] = {}
        #: The version of the object before our commit, where it was read.
        self._stood: str | None = None
        #: Whether any of that was something else: then it is of no use to anybody.
        self._differs = False
        self._parts: dict[int, UploadedPart] = {}
        self._running: dict[Future[UploadedPart], int] = {}
        self._threads = ThreadPoolExecutor(settings.parallel, "s3-part")
        self._failed: WorkerError | None = None
        self._ended = False
        #: An abort may come from a thread beside the one that is stuck.
        self._ending = threading.Lock()

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
        """See Sink. StoreUnavailable if somebody has ended the upload, Cancelled if a newer attempt has committed."""
        with self._once_failed_for_ever():
            if not self._upload_id:
                etag = self._put_whole()
            else:
                if self._pieces:
                    self._send_part()
                self._collect(0)
                etag = self._complete()
            stored = self._read_back(etag)
        self._end()
        return stored

    def abort(self) -> None:
        """See Sink. What cannot be aborted now is left to the sweep: an abort must not hide the error before it."""
        if self._end() and self._upload_id:
            bucket = self._target.bucket
            with bucket.cleaning(), contextlib.suppress(WorkerError), translating(self._target.where):
                self._client.abort_multipart_upload(**self._target.place, UploadId=self._upload_id)

    def suspend(self) -> None:
        """See Sink: the parts that have been sent stay. Those that turned out to be something else do not."""
        if not self._upload_id or self._differs:
            self.abort()
        elif self._end():
            self._uploads[self._upload_id] = self._target.owner.job_id

    @contextlib.contextmanager
    def _once_failed_for_ever(self) -> Iterator[None]:
        if self._failed:
            raise self._failed
        try:
            with self._target.bucket.translating(self._target.where):
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
        """What the server shall compare; empty where it does not."""
        return base64_of(body.sha256) if self._by_sha256 else ""

    def _put_whole(self) -> str:
        body = self._take_body()
        asked = {**self._target.place, **self._target.signed, **_checksum(self._digest(body))}
        # With conditions, what is there is put again where its ETag is no MD5.
        before = self._stood = None if self._target.features.conditional else self._before()

        def put(condition: dict[str, Any]) -> str:
            body.seek(0)
            return etag_in(self._client.put_object(**asked, **condition, Body=cast("Any", body)))

        def stands(seen: Seen) -> bool:
            new = before is not None and version_of(seen) != before
            return seen.get("ContentLength") == body.size and (new or etag_in(seen) == body.md5.hex())

        return self._target.settle(put, stands)

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
            if self._ended:  # by an abort beside us, which did not know the upload yet
                with self._target.bucket.cleaning():
                    self._client.abort_multipart_upload(**self._target.place, UploadId=self._upload_id)
                raise Cancelled("shutdown")
        self._uploads[self._upload_id] = self._target.owner.job_id

    def _upload(self, number: int, begin: int, body: PartBody) -> UploadedPart:
        if there := self._there.pop(number, None):
            if there.has(body):
                return replace(there, sha256=self._digest(body))  # SeaweedFS does not list it, but wants it at the end
            self._differs = True
        upload = {"UploadId": self._upload_id, "PartNumber": number}
        with self._target.bucket.translating(self._target.where):
            if self._copier:
                if copied := self._copier.copy(self._target, upload, begin, body):
                    return copied
                self._differs |= self._copier.lied
            return self._send(upload, body)

    def _send(self, upload: dict[str, Any], body: PartBody) -> UploadedPart:
        digest = self._digest(body)
        answer = self._client.upload_part(**self._target.place, **upload, **_checksum(digest), Body=cast("Any", body))
        return UploadedPart(body.size, etag_in(answer), digest)

    def _collect(self, most: int) -> None:
        """Take the answers that are there, and wait until *most* parts are under way."""
        while True:
            for each in [each for each in self._running if each.done()]:
                self._parts[self._running.pop(each)] = each.result()
            if len(self._running) <= most:
                return
            wait(self._running, return_when=FIRST_COMPLETED)

    def _complete(self) -> str:
        parts = self._listed_parts()
        self._refuse_other_size(sum(part.size for part in parts))
        # An object that comes to be there while we complete ours is ours: only one job at a time writes a key.
        before = self._stood = self._before()
        etag = etag_of([part.etag for part in parts])
        listed = [_listed(number, part) for number, part in enumerate(parts, 1)]
        size: dict[str, Any] = {"MpuObjectSize": self._size} if self._by_sha256 else {}

        def complete(condition: dict[str, Any]) -> str:
            upload: Any = {"UploadId": self._upload_id, "MultipartUpload": {"Parts": listed}}
            return etag_in(self._client.complete_multipart_upload(**self._target.place, **upload, **size, **condition))

        def stands(seen: Seen) -> bool:
            if seen.get("ContentLength") != self._size or not self._target.may_be_ours(seen):
                return False
            return etag_in(seen) == etag or (before is not None and version_of(seen) != before)

        return self._target.settle(complete, stands)

    def _before(self) -> str | None:
        """Return the version of what is there before our commit; None where we may not look."""
        try:
            seen = self._target.look()
        except StoreDenied:
            return None
        return version_of(seen) if seen else _ABSENT

    def _listed_parts(self) -> list[UploadedPart]:
        """Return the parts in their order; the ETags that some proxies leave out are in the server's list of parts."""
        if not all(part.etag for part in self._parts.values()):
            upload: Any = {"Key": self._target.path, "UploadId": self._upload_id}
            there = dict(parts_of(self._target.bucket, upload))
            for number, part in self._parts.items():
                same = number in there and there[number].size == part.size
                self._parts[number] = part if part.etag or not same else replace(part, etag=there[number].etag)
        if missing := [number for number, part in self._parts.items() if not part.etag]:
            what = f"The store tells no ETag of part {missing[0]}, neither when it takes it nor in its list of parts"
            raise StoreDenied(what, self._target.where, "Look at the service, and at what is in front of it")
        return [self._parts[number] for number in sorted(self._parts)]

    def _read_back(self, etag: str) -> StoredObject:
        """Return what the store has; it may show nothing, or the object before, for a while.

        Some stores show another ETag than they returned. Then a version that was not there before is ours.
        """

        def is_new(seen: Seen) -> bool:
            same = not etag or not etag_in(seen) or etag_in(seen) == etag
            replaced = self._stood is not None and version_of(seen) != self._stood
            return (same or replaced) and seen.get("ContentLength", self._size) == self._size

        seen = self._target.seen_late(is_new, self._target.bucket.settings.late_s)
        if seen is None:
            what = "The store has taken the object, and does not show it"
            raise StoreUnavailable(what, self._target.where, "Try again")
        self._refuse_other_size(size_in(seen, self._target.where))
        return StoredObject(self.key, self._size, modified=time_in(seen))

    def _refuse_other_size(self, found: int) -> None:
        if found != self._size:
            what = f"The store has {found} bytes of the {self._size} written"
            raise StoreUnavailable(what, self._target.where, "Try again")

    def _end(self) -> bool:
        """Let go of the parts under way, which stop at their next piece; False if that was done before."""
        with self._ending:
            if self._ended:
                return False
            self._ended = True
        self._uploads.pop(self._upload_id, None)
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(list(self._running), timeout=_PATIENCE_S)
        self._pieces.clear()
        return True


def _listed(number: int, part: UploadedPart) -> CompletedPartTypeDef:
    told: CompletedPartTypeDef = {"PartNumber": number, "ETag": f'"{part.etag}"'}
    told.update(_checksum(part.sha256))
    return told


def _checksum(digest: str) -> Any:
    return {"ChecksumSHA256": digest} if digest else {}
