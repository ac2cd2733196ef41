"""An image store in a bucket, or below a prefix of a bucket."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeGuard

from botocore.exceptions import ClientError

from ssvm_worker.artifacts.layout import check_foreign_key, check_key
from ssvm_worker.errors import (
    InvalidRequest,
    ObjectNotFound,
    SourceChanged,
    SourceUnavailable,
    StoreAway,
    StoreUnavailable,
)
from ssvm_worker.net.sockets import TICK, Stalled
from ssvm_worker.stores.sorted_listing import below, check_prefix, in_order, is_key, passes
from ssvm_worker.streaming.interfaces import CHUNK, Check, Owner, Sink, Store, StoredObject, StoreUsage

from .capabilities import Features, known_features, probe
from .client import Bucket, S3Settings
from .commit import CommitTarget
from .listing import objects_in
from .multipart import abandoned_uploads_rule, abort_upload, open_uploads, parts_of
from .responses import BODY_ERRORS, code_of, etag_in, range_begin, size_in, time_in, version_of, whole_size
from .upload import PartCopier, S3Sink

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import MultipartUploadTypeDef

#: The limit of S3 in bytes of UTF-8.
_MAX_PATH = 1024


class S3Store:
    """The objects of *bucket* below *prefix*.

    The store is not ``resumable``, because parts cannot be read back. A resumed writer takes all bytes again, and sends
    only the missing parts.
    """

    resumable = False
    chunk_size = CHUNK

    def __init__(self, name: str, bucket: str, prefix: str, settings: S3Settings, check: Check = lambda: None) -> None:
        """The store calls *check* while it waits for the server. *check* raises if the caller must stop."""
        prefix = check_prefix(prefix)
        self.name = name
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._bucket = Bucket(bucket, settings, check, is_image_store=True)
        self._root = below(prefix)
        #: The job of each upload that this process has begun. The server does not know it.
        self._uploads: dict[str, str] = {}
        self._check = check_key

    def lenient(self) -> S3Store:
        """See HoldsForeign."""
        twin = copy.copy(self)
        twin._check = check_foreign_key
        return twin

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
        """See Store. The sink sends a small object at its commit."""
        path = self._root + self._check(key)
        self._bucket.check()
        target = CommitTarget(self._bucket, path, key, self._location(key), owner, self.features)
        copier = PartCopier(copy_from._bucket.name, copy_from._root + key) if self._shares_server(copy_from) else None
        return S3Sink(target, size_hint, self._uploads, resume=resume, copier=copier)

    @property
    def features(self) -> Features:
        """The optional features of the server. The first use may probe them."""
        return known_features(self._bucket, self._root)

    def examine(self) -> Features:
        """Probe the features of the server again. Raise StoreDenied without the right to write."""
        self._bucket.check(again=True)
        with self._bucket.translating(self._bucket.location):
            return probe(self._bucket, self._root)

    def abandoned_uploads_rule(self) -> str | None:
        """See ``multipart.abandoned_uploads_rule``. The rule applies to the store's prefix."""
        with self._bucket.translating(self._bucket.location):
            return abandoned_uploads_rule(self._bucket, self._root)

    def reader(self, key: str) -> S3Reader:
        """See Store."""
        return S3Reader(self._bucket, self._root + self._check(key), self._location(key))

    def presign(self, key: str, seconds: int) -> str:
        """Return a URL with which anyone can read the object for *seconds*. The URL cannot be revoked."""
        path = self._root + self._check(key)
        disposition = f'attachment; filename="{key.rpartition("/")[2]}"'
        parameters = {"Bucket": self._bucket.name, "Key": path, "ResponseContentDisposition": disposition}
        with self._translating(key):
            return self._bucket.client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=seconds)

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        path = self._root + self._check(key)
        try:
            with self._translating(key):
                head = self._bucket.client.head_object(Bucket=self._bucket.name, Key=path)
        except ObjectNotFound:
            # An answer to HEAD has no body, so the error may mean a missing object or a missing bucket.
            self._bucket.check(again=True)
            raise
        return StoredObject(key, size_in(head, self._location(key)), modified=time_in(head))

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store. The store sorts the objects, because servers use different orders. Memory: see ``in_order``."""
        yield from in_order(each for each in self._listed(prefix) if passes(self._check, each.key))

    def foreign(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield the objects below *prefix* that ``list`` omits because of their keys, in any order."""
        yield from (each for each in self._listed(prefix) if not is_key(each.key) and not each.key.endswith("/"))

    def delete_foreign(self, key: str) -> None:
        """Delete an object that ``foreign`` has found. A missing object is no error."""
        with contextlib.suppress(ObjectNotFound), self._translating(key):
            self._bucket.client.delete_object(Bucket=self._bucket.name, Key=self._root + key)

    def _listed(self, prefix: str) -> Iterator[StoredObject]:
        """Yield the objects in the server's order. Another thread requests the next page meanwhile."""
        paginator = self._bucket.client.get_paginator("list_objects_v2")
        pages = iter(paginator.paginate(Bucket=self._bucket.name, Prefix=self._below(prefix)))
        with ThreadPoolExecutor(1, "s3-list") as ahead, self._translating(prefix):
            page = ahead.submit(next, pages, None)
            while current := page.result():
                page = ahead.submit(next, pages, None)
                for each in objects_in(current):
                    key = each.get("Key", "")[len(self._root) :]
                    yield StoredObject(key, size_in(each, self._bucket.location), modified=time_in(each))

    def delete(self, key: str) -> None:
        """See Store."""
        path = self._root + self._check(key)
        with contextlib.suppress(ObjectNotFound), self._translating(key):
            self._bucket.client.delete_object(Bucket=self._bucket.name, Key=path)

    def sweep(self, older_than_s: float, prefix: str = "", *, spare: str = "") -> int:
        """See Store. The sweep aborts multipart uploads.

        The server does not know the job of an upload. So with *spare* the sweep also keeps uploads of other processes,
        which may belong to that job. The job's writer takes over the uploads for its key. Only one job at a time
        writes below a prefix that it sweeps.
        """
        limit = time.time() - older_than_s
        with self._translating(prefix):
            old = [
                each
                for each in open_uploads(self._bucket, self._below(prefix))
                if not (spare and self._uploads.get(each["UploadId"], spare) == spare)
                and (not older_than_s or _progress(self._bucket, each)[1] <= limit)
            ]
            for each in old:
                abort_upload(self._bucket, each)
        return len(old)

    def leftovers(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store. The store requests the list of parts of each upload."""
        with self._translating(prefix):
            for each in open_uploads(self._bucket, self._below(prefix)):
                if passes(self._check, key := each["Key"][len(self._root) :]):
                    size, modified = _progress(self._bucket, each)
                    yield StoredObject(key, size, modified=modified)

    def usage(self) -> StoreUsage:
        """Return no sizes: a bucket's size is known only after a list of all objects."""
        return StoreUsage(None, None, None)

    def _shares_server(self, copy_from: Store | None) -> TypeGuard[S3Store]:
        """Return whether the server can copy from that store: it has both buckets with the same keys."""
        if not isinstance(copy_from, S3Store) or self._bucket.settings.account != copy_from._bucket.settings.account:
            return False
        return self.features.copies

    def _translating(self, key: str) -> AbstractContextManager[None]:
        return self._bucket.translating(self._location(key))

    def _location(self, key: str) -> str:
        return f"{self.name}:{key} ({self._bucket.location})"

    def _below(self, prefix: str) -> str:
        return self._root + below(prefix)


class S3Reader:
    """See Source. Holds one connection while it is open."""

    resumable = True

    def __init__(self, bucket: Bucket, path: str, location: str) -> None:
        self.name = location
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
        # A server that does not support ranges sends the whole object. Some caches send a larger range.
        position = range_begin(answer)
        if position > offset:
            what = f"The store sent the object from byte {position} on, not from byte {offset}"
            raise SourceUnavailable(what, self.name, "Check the service, and the proxies in front of it")
        for chunk in self._body(answer["Body"]):
            begin = max(0, offset - position)
            position += len(chunk)
            if chunk := chunk[begin:]:
                yield chunk
        if self.size is None:
            self.size = position
        if position < self.size:
            what = f"The object is truncated: it ended {self.size - position} bytes early"
            raise SourceUnavailable(what, self.name, "Check the store")

    def _body(self, body: Any) -> Iterator[bytes]:
        """Yield the bytes of an answer. Raise an error if the body stalls.

        The function reads the SDK's stream, so that the SDK can reuse the connection after the last byte. The socket
        waits for one tick at a time. The SDK gets an error only after a stall or a cancel.
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
            cause = error.__cause__ if isinstance(error.__cause__, Stalled) else error
            what = f"The store's answer is incomplete: {type(cause).__name__}: {cause}"
            raise SourceUnavailable(what, self.name, "Check the store and the network") from error
        finally:
            body.close()

    def _get(self, offset: int) -> Any:
        """Return the answer from *offset* on. At the object's end return None, because a range cannot be empty."""
        name: Any = {"Bucket": self._bucket.name, "Key": self._path}
        conditions: Any = {"Range": f"bytes={offset}-"} if offset else {}
        if self._etag:
            conditions["IfMatch"] = f'"{self._etag}"'
        try:
            answer = self._bucket.client.get_object(**name, **conditions)
        except ClientError as error:
            status = code_of(error)[1]
            if status == 412:
                raise self._changed() from error
            if status != 416:
                raise
            head = self._bucket.client.head_object(**name)
            self._check_same(head, head.get("ContentLength"))
            if self.size != offset:
                raise self._changed() from error
            return None
        size = whole_size(answer)
        if size is None and self.size is None:
            # A chunked answer has no length. HEAD may have it, so that a truncated answer is noticed.
            size = self._bucket.client.head_object(**name).get("ContentLength")
        self._check_same(answer, size)
        return answer

    def _check_same(self, answer: Mapping[str, Any], size: int | None) -> None:
        """Raise SourceChanged if version or size differ from the first answer. A missing value is not a difference."""
        version = version_of(answer)
        known = None not in (self.size, size)
        if (self._version and version and version != self._version) or (known and self.size != size):
            raise self._changed()
        self._etag = self._etag or etag_in(answer)
        self._version = self._version or version
        self.size = size if self.size is None else self.size

    def _changed(self) -> SourceChanged:
        return SourceChanged("The object was overwritten while it was read", self.name, "Read it again")


def s3_destination(url: str, settings: S3Settings, size: int | None, owner: Owner, check: Check = lambda: None) -> Sink:
    """Return a sink for ``s3://bucket/key``. The key may be any key that S3 allows.

    The bucket may have any owner. So the worker does not probe it, and adds no metadata to its objects. The sink takes
    over the parts of an earlier attempt.
    """
    bucket, path = _destination(url, settings, check)
    bucket.check(again=True)
    return S3Sink(CommitTarget(bucket, path, url, f"{url} ({bucket.location})", owner), size, {}, resume=True)


def s3_origin(url: str, settings: S3Settings, check: Check = lambda: None) -> S3Reader:
    """Return a reader of ``s3://bucket/key``, without any access to it."""
    bucket, path = _destination(url, settings, check)
    return S3Reader(bucket, path, f"{url} ({bucket.location})")


def sweep_s3_destination(url: str, settings: S3Settings, check: Check = lambda: None) -> int:
    """Abort the open uploads of earlier attempts for exactly this key. Return their number."""
    bucket, path = _destination(url, settings, check)
    with bucket.translating(f"{url} ({bucket.location})"):
        found = [each for each in open_uploads(bucket, path) if each["Key"] == path]
        for each in found:
            abort_upload(bucket, each)
    return len(found)


def _progress(bucket: Bucket, upload: MultipartUploadTypeDef) -> tuple[int, float]:
    """Return the received bytes, and the time of the last part or of the upload's begin, by the server's clock."""
    size, times = 0, [time_in(upload, "Initiated")] if "Initiated" in upload else []
    for _, part in parts_of(bucket, upload):
        size += max(0, part.size)
        times.append(part.modified)
    return size, max(times, default=time.time())


def _destination(url: str, settings: S3Settings, check: Check) -> tuple[Bucket, str]:
    name, _, path = url.partition("://")[2].partition("/")
    unsafe = any(each in (".", "..") for each in path.split("/")) or any(ord(each) < 32 for each in path)
    if not path or path.endswith("/") or unsafe or len(path.encode()) > _MAX_PATH:
        raise InvalidRequest(
            "The URL has no valid key",
            repr(url[:120]),
            f"Give s3://BUCKET/KEY. A key has at most {_MAX_PATH} bytes, no control characters, and no part . or ..",
        )
    return Bucket(name, settings, check), path
