"""Conditional commits: of two parallel attempts the later one's object remains, if the server supports conditions."""

from __future__ import annotations

import base64
import contextlib
import itertools
import threading
import time
from dataclasses import replace

import pytest

from ssvm_worker.errors import Cancelled, ChecksumMismatch, CorruptImage, StoreDenied, StoreUnavailable
from ssvm_worker.jobs.copy import job as copy
from ssvm_worker.jobs.upload import job as upload
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stores.s3.capabilities import Features
from ssvm_worker.stores.s3.store import S3Store
from ssvm_worker.streaming.interfaces import Owner, StoredObject
from tests.attempts import attempt
from tests.contracts.store import BIG, ME, OTHER, fill, get, keys, put
from tests.copies import PLACE, store_artifact
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3
from tests.unit.stores.s3.test_s3_store import settings_of

_NUMBERS = itertools.count(1)
HEIR = Owner(ME.job_id, ME.token + 1)
SIZES = [pytest.param(1000, id="one PUT"), pytest.param(len(BIG), id="parts")]


@pytest.fixture
def store(faulty_s3: FaultyS3, s3_bucket: str) -> S3Store:
    """Return a store behind the proxy, with known server features."""
    store = S3Store("archive", s3_bucket, f"commit-{next(_NUMBERS)}", settings_of(faulty_s3))
    assert store.features.conditional
    faulty_s3.calls.clear()
    return store


@pytest.mark.parametrize("size", SIZES)
def test_who_lost_the_claim_replaces_nothing(store: S3Store, size: int) -> None:
    """An attempt that was frozen before its commit fails, if its successor has committed."""
    with store.writer("a/object", owner=ME) as frozen, store.writer("a/object", owner=HEIR) as heir:
        fill(frozen, BIG[:size])
        fill(heir, BIG[::-1][:size]).commit()
        with pytest.raises(Cancelled, match="Another worker"):
            frozen.commit()
    assert (get(store, "a/object") == BIG[::-1][:size], store.sweep(0)) == (True, 0)


@pytest.mark.parametrize("size", SIZES)
def test_the_heir_replaces_what_came_before_it(store: S3Store, size: int) -> None:
    """An attempt replaces the object of an earlier attempt of its job, or of any other job."""
    for owner in (OTHER, ME, HEIR):
        put(store, "a/object", BIG[:size], owner=owner)
    put(store, "a/object", BIG[::-1][:size], owner=HEIR)
    assert get(store, "a/object") == BIG[::-1][:size]


def test_both_at_once(store: S3Store) -> None:
    """For any order of two commits, the successor's object remains."""
    for number in range(10):
        key, both = f"a/{number}", threading.Barrier(2)

        def commit(owner: Owner, data: bytes, key: str = key, both: threading.Barrier = both) -> None:
            with store.writer(key, owner=owner) as sink, contextlib.suppress(Cancelled):
                fill(sink, data)
                both.wait()
                sink.commit()

        threads = [threading.Thread(target=commit, args=each) for each in ((ME, b"late"), (HEIR, b"heir"))]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert get(store, key) == b"heir"


def test_replaced_between_look_and_commit(store: S3Store, faulty_s3: FaultyS3) -> None:
    """An object that was replaced after its examination is examined again before it is replaced."""
    put(store, "a/object", b"old")
    go = threading.Event()
    faulty_s3.faults = [Fault("PutObject", 412, "PreconditionFailed", times=2), Fault("PutObject", until=go, times=1)]
    late = threading.Thread(target=_late, args=(store,))
    late.start()
    while faulty_s3.names().count("PutObject") < 4:
        time.sleep(0.01)
    put(store, "a/object", b"heir", owner=HEIR)
    go.set()
    late.join()
    assert get(store, "a/object") == b"heir"


def _late(store: S3Store) -> None:
    with contextlib.suppress(Cancelled, StoreUnavailable):
        put(store, "a/object", b"late")


@pytest.mark.parametrize(("call", "size"), [("PutObject", 1000), ("CompleteMultipartUpload", len(BIG))])
def test_lost_answer(faulty_s3: FaultyS3, s3_bucket: str, call: str, size: int) -> None:
    """A commit whose answer was lost is recognised as the worker's own when it is repeated."""
    store = S3Store("archive", s3_bucket, f"lost-{next(_NUMBERS)}", settings_of(faulty_s3, tries=2))
    assert store.features.conditional
    faulty_s3.faults = [Fault(call, times=1, after=True)]
    put(store, "a/object", BIG[:size])
    assert (get(store, "a/object") == BIG[:size], store.sweep(0)) == (True, 0)


def test_each_part_carries_its_digest(store: S3Store, faulty_s3: FaultyS3) -> None:
    """Objects and parts are sent with their SHA-256, which the signature of version 4 includes."""
    put(store, "a/object", BIG)
    put(store, "a/small", BIG[:1000])
    sent = [each for each in faulty_s3.calls if each.name.startswith(("UploadPart", "PutObject"))]
    assert len(sent) == 4
    for each in sent:
        signed = bytes.fromhex(each.headers["x-amz-content-sha256"])
        assert base64.b64decode(each.headers["x-amz-checksum-sha256"]) == signed
    assert all(each.headers["authorization"].startswith("AWS4-HMAC-SHA256 ") for each in faulty_s3.calls)


@pytest.mark.parametrize("call", ["DeleteObject", "AbortMultipartUpload"])
def test_broken_connection_in_the_clean_up_of_the_probe(faulty_s3: FaultyS3, s3_bucket: str, call: str) -> None:
    """A connection that breaks in the clean-up of the probe hides neither its result nor its error."""
    store = S3Store("archive", s3_bucket, f"broken-{next(_NUMBERS)}", settings_of(faulty_s3))
    faulty_s3.faults = [Fault(call, hangs_up=True)]
    assert store.features == Features(sha256=True, conditional=True, copies=True)
    faulty_s3.faults += [Fault("PutObject", 403, "AccessDenied")]
    with pytest.raises(StoreDenied):
        store.examine()


def test_where_nothing_may_be_tried(faulty_s3: FaultyS3, s3_bucket: str) -> None:
    """With a server that refuses the probe, no extra features are used, and an upload succeeds."""
    store = S3Store("archive", s3_bucket, f"denied-{next(_NUMBERS)}", settings_of(faulty_s3))
    faulty_s3.faults = [Fault("PutObject", 403, "AccessDenied", times=1)]
    put(store, "a/object", BIG)
    asked = {name for each in faulty_s3.calls for name in each.headers}
    assert not asked & {"if-none-match", "if-match", "x-amz-checksum-sha256", "x-amz-meta-ssvm-owner"}
    assert get(store, "a/object") == BIG


# A source that ends early


def short() -> MemoryStore:
    """Return a store whose object is shorter than its manifest says."""
    source: MemoryStore = store_artifact(MemoryStore("primary"), {"7.raw": BIG})
    put(source, PLACE.key("7.raw"), BIG[: 8 << 20])
    return source


def test_a_copy_that_ends_early_is_not_completed(store: S3Store, faulty_s3: FaultyS3) -> None:
    """A source with fewer bytes than its manifest says makes no object, and leaves no upload."""
    request = copy.Request(kind="template", account="2", id="7", stores=["archive"])
    with pytest.raises(CorruptImage):
        copy.run(request, attempt(short(), store))
    assert "UploadPart 1" in faulty_s3.names()
    assert "CompleteMultipartUpload" not in faulty_s3.names()
    assert ([each for each in keys(store) if "manifest" not in each and "draft" not in each], store.sweep(0)) == ([], 0)


class _Cut(MemoryStore):
    """A reader that declares the full size and gives less."""

    def stat(self, key: str) -> StoredObject:
        seen = super().stat(key)
        return replace(seen, size=len(BIG)) if key.endswith(".raw") else seen


def test_an_upload_that_ends_early_is_not_completed(s3_server: S3Server, faulty_s3: FaultyS3, s3_bucket: str) -> None:
    """An upload to a user's bucket is complete or absent."""
    source = _Cut("primary")
    store_artifact(source, {"7.raw": BIG})
    put(source, PLACE.key("7.raw"), BIG[: 8 << 20])
    keys_ = {"endpoint": faulty_s3.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    request = upload.Request(key=PLACE.key("7.raw"), url=f"s3://{s3_bucket}/short", credentials="lab")
    with pytest.raises(ChecksumMismatch):
        upload.run(request, attempt(source, settings={"credentials": {"lab": keys_}}))
    assert "CompleteMultipartUpload" not in faulty_s3.names()
    assert "AbortMultipartUpload" in faulty_s3.names()
