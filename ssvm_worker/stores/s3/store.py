"""An image store in a bucket, or below a prefix of one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeGuard

from botocore.exceptions import ClientError

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import (
    InvalidRequest,
    ObjectNotFound,
    SourceChanged,
    SourceUnavailable,
    StoreAway,
    StoreUnavailable,
)
from ssvm_worker.net.sockets import TICK, Stalled
from ssvm_worker.stores.sorted_listing import below, check_prefix, in_order, is_key
from ssvm_worker.streaming.interfaces import CHUNK, Check, Owner, Sink, Store, StoredObject, StoreUsage

from .capabilities import Features, known_features, probe
from .client import Bucket, S3Settings
from .commit import CommitTarget
from .errors import BODY_ERRORS, code_of
from .lifecycle import orphan_rule
from .multipart import abort_upload, open_uploads, parts_of
from .responses import etag_in, size_in, time_in, version_of, whole_size
from .server_copy import PartCopier
from .upload import S3Sink

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import MultipartUploadTypeDef

#: S3's own limit, in bytes of UTF-8.
_MAX_PATH = 1024


class S3Store:
    """The objects of *bucket* below *prefix*.

    Not ``resumable``, as parts cannot be read back: a writer that resumes takes all bytes again, and sends the rest.
    """

    resumable = False

    def __init__(self, name: str, bucket: str, prefix: str, settings: S3Settings, check: Check = lambda: None) -> None:
        """*check* is called while the server is waited for, and raises if the caller must stop."""
        prefix = check_prefix(prefix)
        self.name = name
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._bucket = Bucket(bucket, settings, check, ours=True)
        self._root = below(prefix)
        #: The job of every upload that this process has begun, for a server cannot tell it.
        self._uploads: dict[str, str] = {}

    def writer(
        self,
        key: str,
        size_hint: int | None = None,
        *,
        owner: Owner,
        resume: bool = False,
        max_bytes: int | None = None,  # noqa: ARG002
        copy_from: Store | None = None,
    ) -> S3Sink:
        """See Store. The bytes of a small object are sent at its commit."""
        path = self._root + check_key(key)
        self._bucket.check()
        target = CommitTarget(self._bucket, path, key, self._where(key), owner, self.features)
        copier = PartCopier(copy_from._bucket.name, copy_from._root + key) if self._shares_server(copy_from) else None
        return S3Sink(target, size_hint, self._uploads, resume=resume, copier=copier)

    @property
    def features(self) -> Features:
        """What the server can do; found out by the first who asks."""
        return known_features(self._bucket, self._root)

    def examine(self) -> Features:
        """What the server can do now, whatever was known of it. Raises StoreDenied where we may not write."""
        self._bucket.check(again=True)
        with self._bucket.translating(self._bucket.place):
            return probe(self._bucket, self._root)

    def orphan_rule(self) -> str | None:
        """See ``s3_lifecycle.orphan_rule``, for what lies below the store's prefix."""
        with self._bucket.translating(self._bucket.place):
            return orphan_rule(self._bucket, self._root)

    def reader(self, key: str) -> S3Reader:
        """See Store."""
        return S3Reader(self._bucket, self._root + check_key(key), self._where(key))

    def presign(self, key: str, seconds: int) -> str:
        """A URL that gives the object to whoever has it, for *seconds* from now; nobody can revoke it."""
        path = self._root + check_key(key)
        shown = f'attachment; filename="{key.rpartition("/")[2]}"'
        asked = {"Bucket": self._bucket.name, "Key": path, "ResponseContentDisposition": shown}
        with self._translating(key):
            return self._bucket.client.generate_presigned_url("get_object", Params=asked, ExpiresIn=seconds)

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        path = self._root + check_key(key)
        try:
            with self._translating(key):
                seen = self._bucket.client.head_object(Bucket=self._bucket.name, Key=path)
        except ObjectNotFound:
            # An answer to HEAD has no body that would tell a missing object from a missing bucket.
            self._bucket.check(again=True)
            raise
        return StoredObject(key, size_in(seen, self._where(key)), modified=time_in(seen))

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store. Sorted here, as servers do not agree on the order; memory as for ``in_order``."""
        yield from in_order(self._listed(prefix))

    def _listed(self, prefix: str) -> Iterator[StoredObject]:
        pages = self._bucket.client.get_paginator("list_objects_v2")
        with self._translating(prefix):
            for page in pages.paginate(Bucket=self._bucket.name, Prefix=self._below(prefix)):
                for each in page.get("Contents", []):
                    key = each.get("Key", "")[len(self._root) :]
                    if is_key(key):
                        yield StoredObject(key, size_in(each, self._where(key)), modified=time_in(each))

    def delete(self, key: str) -> None:
        """See Store."""
        path = self._root + check_key(key)
        with contextlib.suppress(ObjectNotFound), self._translating(key):
            self._bucket.client.delete_object(Bucket=self._bucket.name, Key=path)

    def sweep(self, older_than_s: float, prefix: str = "", *, spare: str = "") -> int:
        """See Store. Aborts multipart uploads.

        Those that another process has begun may be of job *spare*, as a server cannot tell whose they are: its writer
        takes over those for its key. Only one job at a time writes below a prefix that it sweeps.
        """
        limit = time.time() - older_than_s
        with self._translating(prefix):
            old = [
                each
                for each in open_uploads(self._bucket, self._below(prefix))
                if not (spare and self._uploads.get(each["UploadId"], spare) == spare)
                and (not older_than_s or _parts(self._bucket, each)[1] <= limit)
            ]
            for each in old:
                abort_upload(self._bucket, each)
        return len(old)

    def leftovers(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store. Asks for the parts of each upload."""
        with self._translating(prefix):
            for each in open_uploads(self._bucket, self._below(prefix)):
                if is_key(key := each["Key"][len(self._root) :]):
                    size, when = _parts(self._bucket, each)
                    yield StoredObject(key, size, modified=when)

    def usage(self) -> StoreUsage:
        """See Store: a bucket cannot tell without being walked."""
        return StoreUsage(None, None, None)

    def _shares_server(self, copy_from: Store | None) -> TypeGuard[S3Store]:
        """Whether our server has the bucket of *copy_from* too, by the same keys, and can copy."""
        if not isinstance(copy_from, S3Store) or self._bucket.settings.account != copy_from._bucket.settings.account:
            return False
        return self.features.copies

    def _translating(self, key: str) -> AbstractContextManager[None]:
        return self._bucket.translating(self._where(key))

    def _where(self, key: str) -> str:
        return f"{self.name}:{key} ({self._bucket.place})"

    def _below(self, prefix: str) -> str:
        return self._root + below(prefix)


class S3Reader:
    """See Source; holds one connection while it is open."""

    resumable = True

    def __init__(self, bucket: Bucket, path: str, where: str) -> None:
        self.name = where
        self.size: int | None = None
        self._bucket = bucket
        self._path = path
        self._etag = self._version = ""

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """See Source."""
        try:
            with self._bucket.translating(self.name):
                yield from self._chunks(offset)
        except StoreAway:
            raise
        except StoreUnavailable as error:
            raise SourceUnavailable(*error.args) from error

    def _chunks(self, offset: int) -> Iterator[bytes]:
        answer = self._get(offset)
        if answer is None:
            return
        # A server without ranges sends all of it, from the first byte.
        position = 0 if offset and not answer.get("ContentRange") else offset
        for chunk in self._body(answer["Body"]):
            begin = max(0, offset - position)
            position += len(chunk)
            if chunk := chunk[begin:]:
                yield chunk
        if self.size is None:
            self.size = position
        if position < self.size:
            what = f"The object ended {self.size - position} bytes early"
            raise SourceUnavailable(what, self.name, "Look at the store")

    def _body(self, body: Any) -> Iterator[bytes]:
        """Yield the bytes of an answer, under a watch.

        The SDK's stream is read, so that a connection serves the next call after the last byte. Its socket waits a
        tick at a time; only a stall or a cancel is an error for the SDK.
        """
        stream, watch = body._raw_stream, self._bucket.watch(min_rate=self._bucket.settings.min_rate)
        if file := stream._fp.fp:  # None: the answer is empty
            sock = file.raw._sock
            sock.settimeout(TICK)
            file.raw.readinto = lambda view: watch.wait(lambda: sock.recv_into(view))
        try:
            while chunk := stream.read(CHUNK):
                yield chunk
        except BODY_ERRORS as error:
            found = error.__cause__ if isinstance(error.__cause__, Stalled) else error
            what = f"The store's answer broke off: {type(found).__name__}: {found}"
            raise SourceUnavailable(what, self.name, "Look at the store and the network") from error
        finally:
            body.close()

    def _get(self, offset: int) -> Any:
        """The answer from *offset* on; None at the end, as one byte more than there is cannot be asked for."""
        place: Any = {"Bucket": self._bucket.name, "Key": self._path}
        asked: Any = {"Range": f"bytes={offset}-"} if offset else {}
        if self._etag:
            asked["IfMatch"] = f'"{self._etag}"'
        try:
            answer = self._bucket.client.get_object(**place, **asked)
        except ClientError as error:
            status = code_of(error)[1]
            if status == 412:
                raise self._changed() from error
            if status != 416:
                raise
            seen = self._bucket.client.head_object(**place)
            self._check_same(seen, seen.get("ContentLength"))
            if self.size != offset:
                raise self._changed() from error
            return None
        size = whole_size(answer)
        if size is None and self.size is None:
            # An answer in chunks tells no length. HEAD may, which tells one that is cut from one that is whole.
            size = self._bucket.client.head_object(**place).get("ContentLength")
        self._check_same(answer, size)
        return answer

    def _check_same(self, answer: Mapping[str, Any], size: int | None) -> None:
        """Compare what the answers tell; what one of them leaves out is no difference."""
        version = version_of(answer)
        known = None not in (self.size, size)
        if (self._version and version and version != self._version) or (known and self.size != size):
            raise self._changed()
        self._etag = self._etag or etag_in(answer)
        self._version = self._version or version
        self.size = size if self.size is None else self.size

    def _changed(self) -> SourceChanged:
        return SourceChanged("The object was overwritten while it was read", self.name, "Ask again")


def s3_destination(url: str, settings: S3Settings, size: int | None, owner: Owner, check: Check = lambda: None) -> Sink:
    """A sink for ``s3://bucket/key``, where the key is the user's own and may hold what S3 allows.

    The bucket may be anybody's: it is not probed, and its objects bear no mark of ours. What an earlier attempt has
    sent is taken over.
    """
    bucket, path = _destination(url, settings, check)
    bucket.check(again=True)
    return S3Sink(CommitTarget(bucket, path, url, f"{url} ({bucket.place})", owner), size, {}, resume=True)


def s3_origin(url: str, settings: S3Settings, check: Check = lambda: None) -> S3Reader:
    """The reader of ``s3://bucket/key``; touches nothing."""
    bucket, path = _destination(url, settings, check)
    return S3Reader(bucket, path, f"{url} ({bucket.place})")


def sweep_s3_destination(url: str, settings: S3Settings, check: Check = lambda: None) -> int:
    """Abort the uploads that dead attempts have left open for that very key; returns how many there were."""
    bucket, path = _destination(url, settings, check)
    with bucket.translating(f"{url} ({bucket.place})"):
        left = [each for each in open_uploads(bucket, path) if each["Key"] == path]
        for each in left:
            abort_upload(bucket, each)
    return len(left)


def _parts(bucket: Bucket, upload: MultipartUploadTypeDef) -> tuple[int, float]:
    """Bytes that have come, and when the last of them came or the upload began, by the server's clock."""
    size, times = 0, [time_in(upload, "Initiated")] if "Initiated" in upload else []
    for _, part in parts_of(bucket, upload):
        size += max(0, part.size)
        times.append(part.when)
    return size, max(times, default=time.time())


def _destination(url: str, settings: S3Settings, check: Check) -> tuple[Bucket, str]:
    name, _, path = url.partition("://")[2].partition("/")
    unsafe = any(each in (".", "..") for each in path.split("/")) or any(ord(each) < 32 for each in path)
    if not path or path.endswith("/") or unsafe or len(path.encode()) > _MAX_PATH:
        raise InvalidRequest(
            "The URL has no usable key",
            repr(url[:120]),
            f"Give s3://BUCKET/KEY with a key of at most {_MAX_PATH} bytes, no control characters and no . or ..",
        )
    return Bucket(name, settings, check), path
