"""S3 services that omit headers, lose answers, show objects late, stall, or are behind a proxy."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.config.schema import RetrySection
from ssvm_worker.errors import (
    Cancelled,
    SourceUnavailable,
    StoreAway,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.jobs.upload import job as upload
from ssvm_worker.ledger.retry_policy import decide
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stores.s3 import capabilities
from ssvm_worker.stores.s3.capabilities import Features
from ssvm_worker.stores.s3.client import S3Settings
from ssvm_worker.stores.s3.store import S3Store, s3_destination, s3_origin, sweep_s3_destination
from ssvm_worker.streaming.interfaces import CHUNK, Sink
from ssvm_worker.wiring.assembly import make_attempt
from tests import images
from tests.attempts import attempt
from tests.contracts.source import gather
from tests.contracts.store import BIG, ME, fill, get, keys, put
from tests.copies import PLACE, store_artifact
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3
from tests.unit.stores.s3.test_s3_store import settings_of
from tests.waiting import PATIENCE_S

_NUMBERS = itertools.count(1)
NEVER_S = 1e6
EVERY = frozenset({"etag", "last-modified"})
COMPLETE = "CompleteMultipartUpload"


def open_store_at(proxy: FaultyS3, bucket: str, **more: object) -> S3Store:
    """Return a store behind the proxy, with known server features."""
    store = S3Store("archive", bucket, f"odd-{next(_NUMBERS)}", settings_of(proxy, **more))
    capabilities._KNOWN[capabilities.cache_key(store._bucket)] = Features(sha256=True, conditional=True, copies=True)
    return store


@pytest.fixture
def store(faulty_s3: FaultyS3, s3_bucket: str) -> S3Store:
    """Return a store whose calls have one try."""
    return open_store_at(faulty_s3, s3_bucket, late_s=1.0)


# Missing headers


def read_origin(proxy: FaultyS3, bucket: str) -> bytes:
    return gather(s3_origin(f"s3://{bucket}/origin", settings_of(proxy)))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("GetObject", chunked=True), id="GET in chunks"),
        pytest.param(Fault("GetObject", without=frozenset({"etag"})), id="GET without ETag"),
        pytest.param(Fault("GetObject", without=EVERY, chunked=True), id="GET with nothing"),
        pytest.param(Fault("GetObject", whole=True), id="no ranges"),
    ],
)
def test_objects_by_poor_answers(s3_server: S3Server, faulty_s3: FaultyS3, s3_bucket: str, fault: Fault) -> None:
    """An object is read completely, and from its middle, with any subset of the answer's headers."""
    s3_server.client().put_object(Bucket=s3_bucket, Key="origin", Body=BIG)
    faulty_s3.faults = [fault]
    reader = s3_origin(f"s3://{s3_bucket}/origin", settings_of(faulty_s3))
    assert gather(reader) == BIG
    assert b"".join(reader.open(len(BIG) - 1000)) == BIG[-1000:]
    assert reader.size == len(BIG)


@pytest.mark.parametrize(("begin", "right"), [(0, True), (len(BIG) - 2000, True), (len(BIG) - 999, False)])
def test_another_range(s3_server: S3Server, faulty_s3: FaultyS3, s3_bucket: str, begin: int, right: bool) -> None:
    """The bytes of another range than the requested one are placed where their Content-Range says, or refused."""
    s3_server.client().put_object(Bucket=s3_bucket, Key="origin", Body=BIG)
    faulty_s3.faults = [Fault("GetObject", begins_at=begin)]
    reader = s3_origin(f"s3://{s3_bucket}/origin", settings_of(faulty_s3))
    if right:
        assert b"".join(reader.open(len(BIG) - 1000)) == BIG[-1000:]
    else:
        with pytest.raises(SourceUnavailable, match="not from byte"):
            b"".join(reader.open(len(BIG) - 1000))


UPLOAD = "<Key>a</Key><UploadId>1</UploadId><Initiated>2026-11-29T07:00:00Z</Initiated>"
PAGES = {
    "GetObject": "<ListBucketResult><IsTruncated>true</IsTruncated>"
    "<NextContinuationToken>x</NextContinuationToken></ListBucketResult>",
    "ListMultipartUploads": "<ListMultipartUploadsResult><IsTruncated>true</IsTruncated>"
    f"<Upload>{UPLOAD}</Upload></ListMultipartUploadsResult>",
    "ListParts": "<ListPartsResult><IsTruncated>true</IsTruncated><NextPartNumberMarker>1</NextPartNumberMarker>"
    "<Part><ETag>x</ETag></Part></ListPartsResult>",
}


@pytest.mark.parametrize("call", PAGES)
def test_list_without_an_end(store: S3Store, faulty_s3: FaultyS3, call: str) -> None:
    """A server that sends the same page again and again is a temporary error of the store."""
    if call == "ListParts":
        fill(store.writer("a/object", owner=ME), BIG).suspend()
    faulty_s3.faults = [Fault(name, 200, body=PAGES[call].encode()) for name in (call, "ListObjectsV2 next")]
    with pytest.raises(StoreUnavailable):
        keys(store) if call == "GetObject" else list(store.leftovers())
    faulty_s3.faults = []
    store.sweep(0)


@pytest.mark.parametrize("lost", [frozenset({"etag"}), frozenset({"last-modified"}), EVERY])
@pytest.mark.parametrize("call", ["UploadPart 1", "PutObject", "HeadObject", COMPLETE])
def test_stores_by_poor_answers(store: S3Store, faulty_s3: FaultyS3, call: str, lost: frozenset[str]) -> None:
    """An object is stored, read and listed without the headers that some services omit."""
    faulty_s3.faults = [Fault(call, without=lost)]
    for size in (1000, len(BIG)):
        put(store, "a/object", BIG[:size])
        assert get(store, "a/object") == BIG[:size]
        assert store.stat("a/object").size == size
    assert keys(store) == ["a/object"]


def test_size_that_nobody_tells(store: S3Store, faulty_s3: FaultyS3) -> None:
    """An indispensable header is named in the error, and no connection stays open."""
    faulty_s3.faults = [Fault("HeadObject", chunked=True)]
    with pytest.raises(StoreUnavailable, match="Content-Length"):
        put(store, "a/object", BIG)
    assert store.sweep(0) == 0


def test_ranges_that_are_cut(s3_server: S3Server, faulty_s3: FaultyS3, s3_bucket: str) -> None:
    """A chunked body that ends early or breaks in any way is a broken source."""
    s3_server.client().put_object(Bucket=s3_bucket, Key="origin", Body=BIG)
    faulty_s3.faults = [Fault("GetObject", cut_at=CHUNK, chunked=True)]
    with pytest.raises(SourceUnavailable):
        read_origin(faulty_s3, s3_bucket)


# Lost answers


#: A status instead of the answer. 0: the connection ends instead of the answer.
LOST = [0, 500, 502, 503, 504]


def lost(call: str, status: int, times: int = 1) -> Fault:
    """Return the fault that a call has its effect, and its answer does not arrive."""
    return Fault(call, status, after=True, times=times, hangs_up=not status)


@pytest.mark.parametrize("status", LOST)
@pytest.mark.parametrize("tries", [1, 3])
@pytest.mark.parametrize("by_md5", [True, False], ids=["ETags by MD5", "other ETags"])
def test_complete_that_took_effect(
    s3_server: S3Server, faulty_s3: FaultyS3, s3_bucket: str, status: int, tries: int, by_md5: bool
) -> None:
    """An upload whose Complete succeeded, but whose answer was lost, succeeds without another transfer."""
    url = f"s3://{s3_bucket}/lost-{next(_NUMBERS)}"
    faulty_s3.faults = [lost(COMPLETE, status)]
    if not by_md5:
        faulty_s3.faults += [Fault("HeadObject", without=frozenset({"etag"}))]
    with s3_destination(url, settings_of(faulty_s3, tries=tries, late_s=1.0), len(BIG), ME) as sink:
        assert fill(sink, BIG).commit().size == len(BIG)
    assert sum(name.startswith("UploadPart") for name in faulty_s3.names()) == 3


@pytest.mark.parametrize("status", [0, 500, 504])
def test_put_that_took_effect(faulty_s3: FaultyS3, s3_bucket: str, store: S3Store, status: int) -> None:
    """The same is true of a small object, in a store and in a foreign bucket."""
    faulty_s3.faults = [lost("PutObject", status, times=2)]
    put(store, "a/object", b"small")
    url = f"s3://{s3_bucket}/lost-{next(_NUMBERS)}"
    with s3_destination(url, settings_of(faulty_s3, late_s=1.0), 5, ME) as sink:
        fill(sink, b"small").commit()
    assert get(store, "a/object") == b"small"


def test_complete_that_took_no_effect(faulty_s3: FaultyS3, s3_server: S3Server, s3_bucket: str) -> None:
    """An earlier object of the same size is not mistaken for the lost one."""
    key = f"old-{next(_NUMBERS)}"
    s3_server.client().put_object(Bucket=s3_bucket, Key=key, Body=BIG[::-1])
    faulty_s3.faults = [Fault(COMPLETE, 500)]
    sink = s3_destination(f"s3://{s3_bucket}/{key}", settings_of(faulty_s3, late_s=0.1), len(BIG), ME)
    with sink, pytest.raises(StoreUnavailable):
        fill(sink, BIG).commit()
    assert s3_server.client().get_object(Bucket=s3_bucket, Key=key)["Body"].read() == BIG[::-1]


def test_complete_takes_its_time(faulty_s3: FaultyS3, s3_bucket: str) -> None:
    """Complete may take longer than any other call, because the server assembles the object then."""
    store = open_store_at(faulty_s3, s3_bucket, stall_s=1.5, commit_s=600.0)
    faulty_s3.faults = [Fault(COMPLETE, until=(go := threading.Event()), times=1)]
    timer = threading.Timer(2.5, go.set)
    timer.start()
    put(store, "a/object", BIG)
    assert get(store, "a/object") == BIG
    timer.join()


@pytest.mark.parametrize("status", [0, 500])
@pytest.mark.parametrize("call", ["UploadPart 1", "CreateMultipartUpload", "ListMultipartUploads"])
def test_other_answers_that_are_lost(faulty_s3: FaultyS3, s3_bucket: str, call: str, status: int) -> None:
    """A call that is repeated after a lost answer has its normal effect."""
    url = f"s3://{s3_bucket}/again-{next(_NUMBERS)}"
    settings = settings_of(faulty_s3, tries=2)
    faulty_s3.faults = [lost(call, status)]
    with s3_destination(url, settings, len(BIG), ME) as sink:
        fill(sink, BIG).commit()
    sweep_s3_destination(url, settings)
    assert sweep_s3_destination(url, settings) == 0


@pytest.mark.parametrize("status", [0, 500])
@pytest.mark.parametrize("call", ["AbortMultipartUpload", "DeleteObject"])
def test_removals_whose_answer_is_lost(faulty_s3: FaultyS3, s3_bucket: str, call: str, status: int) -> None:
    """The deletion of an object that the first try has deleted succeeds."""
    store = open_store_at(faulty_s3, s3_bucket, tries=2)
    put(store, "a/object", b"1")
    fill(store.writer("a/other", owner=ME), BIG).suspend()
    faulty_s3.faults = [lost(call, status)]
    store.delete("a/object")
    assert store.sweep(0) == 1
    assert (keys(store), store.sweep(0)) == ([], 0)


# Objects that show late


@pytest.mark.parametrize("size", [1000, len(BIG)])
@pytest.mark.parametrize("old", [None, 500], ids=["nothing before", "another before"])
def test_object_that_shows_late(faulty_s3: FaultyS3, s3_bucket: str, size: int, old: int | None) -> None:
    """If a store shows no object or an old one after a commit, it is asked again."""
    store = open_store_at(faulty_s3, s3_bucket, late_s=600.0)
    if old:
        put(store, "a/object", BIG[:old])
    with store.writer("a/object", owner=ME) as sink:
        fill(sink, BIG[:size])
        looks = 2 if size == len(BIG) and not old else 1
        faulty_s3.faults = [Fault("HeadObject", 404, "NoSuchKey", times=looks + 1)] if not old else []
        assert sink.commit().size == size
    assert get(store, "a/object") == BIG[:size]


def test_object_that_never_shows(store: S3Store, faulty_s3: FaultyS3) -> None:
    """An object that does not appear in time is a temporary error that says so."""
    with store.writer("a/object", owner=ME) as sink:
        faulty_s3.faults = [Fault("HeadObject", 404, "NoSuchKey")]
        with pytest.raises(StoreUnavailable, match="does not show it"):
            fill(sink, b"1").commit()


# Services behind a proxy

PAGE = b"<html><body><h1>Bad Gateway</h1></body></html>"


@pytest.mark.parametrize("status", [502, 504])
def test_page_of_a_proxy(store: S3Store, faulty_s3: FaultyS3, status: int) -> None:
    """An HTML error page is a temporary error of the store."""
    put(store, "a/b", b"1")
    faulty_s3.faults = [Fault(name, status, body=PAGE) for name in ("PutObject", "GetObject", "ListMultipartUploads")]
    for act in (lambda: put(store, "a/b", b"2"), lambda: get(store, "a/b"), lambda: store.sweep(0)):
        with pytest.raises((StoreUnavailable, SourceUnavailable)):
            act()


def test_page_in_place_of_an_answer(store: S3Store, faulty_s3: FaultyS3) -> None:
    """A login page with status 200 is a temporary error, because it is no S3 answer."""
    faulty_s3.faults = [Fault("GetObject", 200, body=b"<html><p>Log in</html>")]
    with pytest.raises(StoreUnavailable, match="is unavailable"):
        keys(store)


def test_environment_names_a_proxy(
    store: S3Store, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch, s3_bucket: str
) -> None:
    """The environment's proxies get no request, not even one for the machine's role."""
    names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY")
    for name in names:
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    put(store, "a/object", b"1")
    assert get(S3Store("again", s3_bucket, "", settings_of(faulty_s3)), f"{store._root}a/object") == b"1"
    from botocore.utils import InstanceMetadataFetcher

    assert InstanceMetadataFetcher()._session._proxy_config.proxy_url_for("http://169.254.169.254/") is None


# An absent store


@pytest.mark.parametrize("status", [429, 503])
def test_store_that_asks_to_wait(store: S3Store, faulty_s3: FaultyS3, status: int) -> None:
    """An overloaded store costs no attempt, and the job waits for its Retry-After."""
    faulty_s3.faults = [Fault("PutObject", status, "SlowDown", retry_after="321")]
    with pytest.raises(StoreAway) as away:
        put(store, "a/object", b"1")
    decision = decide(away.value, 99, RetrySection())
    assert (decision.state, decision.counted, decision.delay_s) == ("queued", False, 321.0)


def test_retry_after_is_obeyed_at_once(faulty_s3: FaultyS3, s3_bucket: str) -> None:
    """A long Retry-After ends the SDK's own tries, and no request is sent before its time."""
    store = open_store_at(faulty_s3, s3_bucket, tries=3)
    faulty_s3.faults = [Fault("PutObject", 503, "SlowDown", retry_after="60")]
    with pytest.raises(StoreAway):
        put(store, "a/object", b"1")
    assert faulty_s3.names().count("PutObject") == 1


@pytest.mark.parametrize("call", ["PutObject", "UploadPart 1", "CompleteMultipartUpload"])
def test_valid_call_is_rejected_once(faulty_s3: FaultyS3, s3_bucket: str, call: str) -> None:
    """A call is repeated after InvalidRequest, because SeaweedFS sends it for faults inside the server."""
    store = open_store_at(faulty_s3, s3_bucket, tries=3)
    data = b"1" if call == "PutObject" else BIG
    faulty_s3.faults = [Fault(call, 400, "InvalidRequest", times=1)]
    put(store, "a/object", data)
    assert get(store, "a/object") == data
    assert faulty_s3.names().count(call) == 2


@pytest.mark.parametrize("status", [500, 502, 504])
def test_one_call_that_fails_counts(store: S3Store, faulty_s3: FaultyS3, status: int) -> None:
    """A failed call counts as an attempt exactly if the store serves other calls."""
    faulty_s3.faults = [Fault("PutObject", status)]
    with pytest.raises(StoreUnavailable) as failed:
        put(store, "a/object", b"1")
    assert not isinstance(failed.value, StoreAway)
    faulty_s3.faults += [Fault("HeadObject", status)]
    with pytest.raises(StoreAway):
        put(store, "a/object", b"1")


def test_a_strangers_bucket_may_not_hold_a_job(faulty_s3: FaultyS3, s3_bucket: str) -> None:
    """Attempts at an upload's destination and at a download's source count for any answer."""
    faulty_s3.faults = [Fault("PutObject", 503, "SlowDown"), Fault("GetObject", 503, "SlowDown")]
    sink = s3_destination(f"s3://{s3_bucket}/x", settings_of(faulty_s3), 1, ME)
    with sink, pytest.raises(StoreUnavailable) as failed:
        fill(sink, b"1").commit()
    with pytest.raises(SourceUnavailable):
        read_origin(faulty_s3, s3_bucket)
    assert not isinstance(failed.value, StoreAway)


# A silent server


class Stop:
    """A check that raises after it was set."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def __call__(self) -> None:
        if self.told.is_set():
            raise Cancelled("user")


Act = Callable[[str, S3Settings, Callable[[], None]], object]


def _put(bucket: str, settings: S3Settings, check: Callable[[], None]) -> None:
    with s3_destination(f"s3://{bucket}/silent-{next(_NUMBERS)}", settings, 5, ME, check) as sink:
        fill(sink, b"small").commit()


def _parts(bucket: str, settings: S3Settings, check: Callable[[], None]) -> None:
    with s3_destination(f"s3://{bucket}/silent-{next(_NUMBERS)}", settings, len(BIG), ME, check) as sink:
        fill(sink, BIG).commit()


def _read(bucket: str, settings: S3Settings, check: Callable[[], None]) -> None:
    gather(s3_origin(f"s3://{bucket}/origin", settings, check))


def _list(bucket: str, settings: S3Settings, check: Callable[[], None]) -> None:
    list(S3Store("archive", bucket, "", settings, check).list())


STAGES = [
    pytest.param("HeadObject", _put, id="check of the bucket"),
    pytest.param("PutObject", _put, id="PutObject"),
    pytest.param("CreateMultipartUpload", _parts, id="CreateMultipartUpload"),
    pytest.param("ListMultipartUploads", _parts, id="ListMultipartUploads"),
    pytest.param("UploadPart 2", _parts, id="UploadPart"),
    pytest.param(COMPLETE, _parts, id=COMPLETE),
    pytest.param("GetObject", _read, id="GetObject"),
    pytest.param("body", _read, id="body"),
    pytest.param("GetObject", _list, id="list"),
]


@pytest.fixture
def silence(faulty_s3: FaultyS3, s3_server: S3Server, s3_bucket: str) -> Any:
    """Make the server silent at a stage, until the test has ended."""
    s3_server.client().put_object(Bucket=s3_bucket, Key="origin", Body=BIG)
    woken = threading.Event()

    def fall_silent(stage: str) -> None:
        body = Fault("GetObject", silent_after=3 * CHUNK, woken=woken)
        faulty_s3.faults = [body if stage == "body" else Fault(stage, until=woken)]
        if stage != "body":
            faulty_s3.faults += [Fault("AbortMultipartUpload", until=woken)]

    yield fall_silent
    woken.set()


@pytest.mark.parametrize(("stage", "act"), STAGES)
def test_cancel_while_silent(
    faulty_s3: FaultyS3, s3_bucket: str, silence: Callable[[str], None], stage: str, act: Act
) -> None:
    """A cancel ends the wait for a silent server in any call, long before the call's own end."""
    stop, raised = Stop(), list[BaseException]()
    silence(stage)

    def run() -> None:
        try:
            act(s3_bucket, settings_of(faulty_s3, stall_s=NEVER_S, commit_s=NEVER_S), stop)
        except Cancelled as error:
            raised.append(error)

    job = threading.Thread(target=run, daemon=True)
    job.start()
    fault = faulty_s3.faults[0]
    while not any(call.name == fault.name for call in faulty_s3.calls):
        time.sleep(0.01)
    stop.told.set()
    job.join(PATIENCE_S)
    assert [error.reason for error in raised if isinstance(error, Cancelled)] == ["user"]


@pytest.mark.parametrize(("stage", "act"), STAGES)
def test_silence_is_a_stall(
    faulty_s3: FaultyS3, s3_bucket: str, silence: Callable[[str], None], stage: str, act: Act
) -> None:
    """A server that is silent for stall_s is a temporary error in any call."""
    silence(stage)
    with pytest.raises((StoreUnavailable, SourceUnavailable)):
        act(s3_bucket, settings_of(faulty_s3, stall_s=1.0, commit_s=1.0, late_s=0.1), lambda: None)


def test_an_object_that_drips(faulty_s3: FaultyS3, s3_server: S3Server, s3_bucket: str) -> None:
    """An object that arrives too slowly has stalled, although its server is never silent."""
    s3_server.client().put_object(Bucket=s3_bucket, Key="origin", Body=BIG)
    fault = Fault("GetObject", silent_after=CHUNK, drips=True)
    faulty_s3.faults = [fault]
    with pytest.raises(SourceUnavailable, match="Only"):
        gather(s3_origin(f"s3://{s3_bucket}/origin", settings_of(faulty_s3, stall_s=1.0)))
    fault.woken.set()


def test_aborted_from_two_threads(faulty_s3: FaultyS3, s3_bucket: str, s3_server: S3Server) -> None:
    """Two parallel aborts beside a writing thread end one upload once, and raise nothing."""
    for _ in range(5):
        url = f"s3://{s3_bucket}/twice-{next(_NUMBERS)}"
        faulty_s3.faults = [Fault("CreateMultipartUpload", until=(go := threading.Event()), times=1)]
        sink = s3_destination(url, settings_of(faulty_s3), len(BIG), ME)
        writer = threading.Thread(target=lambda sink=sink: _fill_quietly(sink), daemon=True)
        writer.start()
        both = [threading.Thread(target=sink.abort) for _ in range(2)]
        for each in both:
            each.start()
        go.set()
        for each in (*both, writer):
            each.join()
        assert sweep_s3_destination(url, settings_of(s3_server)) == 0


def _fill_quietly(sink: Sink) -> None:
    with contextlib.suppress(WorkerError, RuntimeError):
        fill(sink, BIG)


def test_a_cancelled_job_hears_it_at_a_silent_destination(
    faulty_s3: FaultyS3, s3_server: S3Server, s3_bucket: str, silence: Callable[[str], None]
) -> None:
    """The job's check ends calls of its destination, but its clean-up still runs."""
    source: MemoryStore = store_artifact(MemoryStore("primary"), {"7.raw": images.mbr(1 << 20)})
    silence("PutObject")
    given = {"endpoint": faulty_s3.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    request = upload.Request(key=PLACE.key("7.raw"), url=f"s3://{s3_bucket}/job", credentials="lab")

    def reason() -> str | None:
        return "user" if "PutObject" in faulty_s3.names() else None

    with pytest.raises(Cancelled):
        upload.run(request, attempt(source, settings={"credentials": {"lab": given}}, stop_reason=reason))


def test_stores_of_an_attempt_are_checked(faulty_s3: FaultyS3, s3_server: S3Server, s3_bucket: str) -> None:
    """The stores of an attempt obey its cancel, except during clean-up."""
    given = {"endpoint": faulty_s3.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    settings = config.parse({"stores": {"archive": given | {"url": f"s3://{s3_bucket}/checked"}}}, "test")
    faulty_s3.faults = [Fault("GetObject", until=(go := threading.Event()))]
    stopped = make_attempt(settings, "job", stop_reason=lambda: "user")
    with pytest.raises(Cancelled):
        list(stopped.store("archive").list())
    go.set()
    assert list(stopped.for_cleanup().store("archive").list()) == []


def test_a_cancel_shortens_no_call_of_the_next_job(faulty_s3: FaultyS3, s3_server: S3Server, s3_bucket: str) -> None:
    """A cancelled job's clean-up is short at a silent server, and the next job waits as usual."""
    given = {"endpoint": faulty_s3.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    settings = config.parse({"stores": {"archive": given | {"url": f"s3://{s3_bucket}/next"}}}, "test")
    faulty_s3.faults = [Fault("GetObject", until=(go := threading.Event()))]
    with pytest.raises(Cancelled):
        list(make_attempt(settings, "job", stop_reason=lambda: "user").store("archive").list())
    timer = threading.Timer(1.5, go.set)
    timer.start()
    assert list(make_attempt(settings, "next").store("archive").list()) == []
    timer.join()
