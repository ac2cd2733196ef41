"""The sink of an S3 store: one PUT for a small object, else a multipart upload with several parts under way."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TypedDict, cast

from botocore.exceptions import BotoCoreError, ClientError

from ssvm_worker.errors import Cancelled, ObjectNotFound, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.stream import StoredObject
from ssvm_worker.units import KiB, MiB

from .s3_bucket import Bucket
from .s3_errors import translating
from .sink import CannotResume

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

#: S3's own limit. Parts by the hint leave a tenth of it for a hint that was too small.
MAX_PARTS = 10_000
_BY_HINT = 9_000
#: Bytes of chunks that one upload holds, the part that is being filled included. 64 MiB in all are promised for a
#: transfer; with the queues before the sink and the SDK, its client included, 60 to 62 were measured (tests/bench).
BUDGET = 32 * MiB
#: Without a hint, parts grow twofold every 1000 after the first 3000: 15 GiB in the smallest parts, 1.2 TiB in all.
_STEADY, _STEP = 3000, 1000
#: Bytes that one read of a body copies. The SDK asks for 1 MiB to sign: 5 MiB more of memory, with three parts at once.
_PIECE = 128 * KiB
#: Seconds that an abort waits for parts under way; one that ends later is left to the sweep.
_PATIENCE_S = 10


def part_size(number: int, least: int, size_hint: int | None, sent: int) -> int:
    """Bytes of part *number* (from 1), when *sent* bytes have gone before it.

    Equal parts while the hint holds; beyond it, or without one, they grow, so that MAX_PARTS suffice. An object of
    more than BUDGET * 9000, 281 GiB, costs one of its parts in memory.
    """
    if size_hint and sent < size_hint:
        return max(least, -(-size_hint // _BY_HINT))
    return int(least * 2 ** max(0, -(-(number - _STEADY) // _STEP)))


class Body(io.RawIOBase):
    """A file over pieces that are not copied; the SDK reads it once to sign and once to send, and again to retry."""

    def __init__(self, pieces: list[memoryview], wanted: Callable[[], bool]) -> None:
        self._pieces = pieces
        self._wanted = wanted
        self._size = sum(map(len, pieces))
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Some of the next *size* bytes, none only at the end; Cancelled when the upload was aborted meanwhile."""
        if size < 0:
            return self.readall()
        if not self._wanted():
            raise Cancelled("shutdown")
        start = self._position
        for piece in self._pieces:
            if start < len(piece):
                found = piece[start : start + min(size, _PIECE)]
                self._position += len(found)
                return found.tobytes()
            start -= len(piece)
        return b""


class _Place(TypedDict):
    Bucket: str
    Key: str


@dataclass(frozen=True)
class Target:
    """Where an object will lie."""

    bucket: Bucket
    #: In the bucket, below the store's prefix.
    path: str
    #: As the store's users say it.
    key: str
    #: For messages.
    where: str


class S3Sink(CannotResume):
    """See Sink; holds BUDGET bytes of chunks (see part_size). The first error is raised again by all that follows."""

    def __init__(self, target: Target, size_hint: int | None, uploads: dict[str, str], job_id: str) -> None:
        """*uploads* is told the job of every upload id that is open."""
        settings = target.bucket.settings
        self.key = target.key
        self._target = target
        self._size_hint = size_hint
        self._uploads = uploads
        self._job_id = job_id
        self._upload_id = ""
        self._part_size = part_size(1, settings.part_size, size_hint, 0)
        self._pieces: list[memoryview] = []
        self._held = 0
        self._size = 0
        self._etags: dict[int, str] = {}
        self._running: dict[Future[str], int] = {}
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

    def commit(self) -> StoredObject:
        """See Sink. Cancelled when somebody has aborted the upload meanwhile."""
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
        for each in self._running:
            each.cancel()
        wait(self._running, timeout=_PATIENCE_S)
        self._pieces.clear()
        if self._upload_id:
            with contextlib.suppress(BotoCoreError, ClientError):
                self._client.abort_multipart_upload(**self._place, UploadId=self._upload_id)

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
    def _place(self) -> _Place:
        return {"Bucket": self._target.bucket.name, "Key": self._target.path}

    def _take_body(self) -> IO[bytes]:
        body = Body(self._pieces, lambda: not self._ended)
        self._pieces, self._held = [], 0
        return cast("IO[bytes]", body)

    def _put_whole(self) -> None:
        body = self._take_body() if self._pieces else b""
        self._client.put_object(**self._place, Body=body)

    def _send_part(self) -> None:
        if not self._upload_id:
            self._upload_id = self._client.create_multipart_upload(**self._place)["UploadId"]
            self._uploads[self._upload_id] = self._job_id
        number = len(self._etags) + len(self._running) + 1
        if number > MAX_PARTS:
            raise StoreFull("The object has more parts than S3 takes", self._target.where, "Send its size with it")
        future = self._threads.submit(self._upload, number, self._take_body())
        self._running[future] = number
        # Wait here, so that what is under way and the next part together stay within the budget.
        at_once = max(0, BUDGET // self._part_size - 1)
        self._collect(min(at_once, self._target.bucket.settings.parallel))
        least = self._target.bucket.settings.part_size
        self._part_size = part_size(number + 1, least, self._size_hint, self._size)

    def _upload(self, number: int, body: IO[bytes]) -> str:
        with translating(self._target.where):
            answer = self._client.upload_part(**self._place, UploadId=self._upload_id, PartNumber=number, Body=body)
        return answer["ETag"]

    def _collect(self, most: int) -> None:
        """Take the answers that are there, and wait until *most* parts are under way."""
        while True:
            for each in [each for each in self._running if each.done()]:
                self._etags[self._running.pop(each)] = each.result()
            if len(self._running) <= most:
                return
            wait(self._running, return_when=FIRST_COMPLETED)

    def _complete(self) -> None:
        parts: list[CompletedPartTypeDef] = [{"PartNumber": n, "ETag": self._etags[n]} for n in sorted(self._etags)]
        try:
            with translating(self._target.where):
                self._client.complete_multipart_upload(
                    **self._place, UploadId=self._upload_id, MultipartUpload={"Parts": parts}
                )
        except Cancelled:
            # No such upload: swept, or completed by a first try whose answer was lost.
            if not self._stands():
                raise

    def _stands(self) -> bool:
        """Whether the object that lies there is the very one that these parts make."""
        try:
            with translating(self._target.where):
                seen = self._client.head_object(**self._place)
        except ObjectNotFound:
            return False
        return seen["ETag"].strip('"') == etag_of([self._etags[n] for n in sorted(self._etags)])

    def _read_back(self) -> StoredObject:
        seen = self._client.head_object(**self._place)
        if seen["ContentLength"] != self._size:
            raise StoreUnavailable(
                f"The store has {seen['ContentLength']} bytes of the {self._size} written",
                self._target.where,
                "Try again",
            )
        return StoredObject(self.key, self._size, when=seen["LastModified"].timestamp())

    def _end(self) -> None:
        self._ended = True
        self._uploads.pop(self._upload_id, None)
        self._threads.shutdown(wait=False)


def etag_of(parts: list[str]) -> str:
    """The ETag of an object made of parts with these ETags: the MD5 of their MD5s; empty where they are none."""
    try:
        joined = b"".join(bytes.fromhex(each.strip('"')) for each in parts)
    except ValueError:
        return ""
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"
