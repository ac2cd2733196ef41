"""The S3 store follows the store contract on a real server; this module tests S3's own features."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import urllib3

from ssvm_worker.errors import (
    ConfigError,
    InvalidRequest,
    ObjectNotFound,
    SourceUnavailable,
    StoreAway,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.stores.s3.capabilities import Features
from ssvm_worker.stores.s3.client import S3Settings
from ssvm_worker.stores.s3.multipart import MAX_PARTS, part_size
from ssvm_worker.stores.s3.store import S3Store, s3_destination, sweep_s3_destination
from ssvm_worker.stores.s3.upload import BUDGET
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes, tap
from ssvm_worker.units import GiB, MiB, TiB
from tests.contracts.store import BIG, ME, OTHER, StoreContract, fill, get, keys, put
from tests.neighbours import free_port, missing
from tests.servers.clock import Clock
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3

_NUMBERS = itertools.count(1)


def settings_of(server: S3Server | FaultyS3, **more: object) -> S3Settings:
    """Return the settings of that server, with the smallest parts that S3 accepts."""
    values = {"endpoint": server.endpoint, "access_key": S3Server.access_key, "secret_key": S3Server.secret_key}
    return S3Settings(**{"part_size": 5 * MiB, "tries": 1, **values, **more})  # type: ignore[arg-type]


@pytest.fixture
def store(s3_server: S3Server, s3_bucket: str) -> S3Store:
    """Return a store with a prefix in the module's bucket."""
    return S3Store("archive", s3_bucket, f"test-{next(_NUMBERS)}", settings_of(s3_server))


@pytest.fixture
def shaky(faulty_s3: FaultyS3, s3_bucket: str) -> S3Store:
    """Return a store behind the faulty proxy, with known server features."""
    store = S3Store("archive", s3_bucket, f"shaky-{next(_NUMBERS)}", settings_of(faulty_s3))
    assert store.features == Features(sha256=True, conditional=True, copies=True)
    faulty_s3.calls.clear()
    return store


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, store: S3Store) -> S3Store:
        return store


# Settings


def test_two_stores_in_one_bucket_are_apart(s3_server: S3Server, s3_bucket: str) -> None:
    """A store reads, sweeps and lists only objects below its prefix, as a whole path component."""
    one = S3Store("one", s3_bucket, "zone/1", settings_of(s3_server))
    ten = S3Store("ten", s3_bucket, "zone/10", settings_of(s3_server))
    put_bytes(ten, "object", b"ten", ME)
    with ten.writer("unfinished", owner=ME) as sink:
        fill(sink, BIG)
        assert (keys(one), one.sweep(0)) == ([], 0)
        sink.commit()
    assert keys(ten) == ["object", "unfinished"]


@pytest.mark.parametrize("bucket", ["", "a", "../b", "b/c", "bücket", "b" * 300])
def test_bad_bucket_names(bucket: str) -> None:
    """An invalid bucket name is an error of the settings."""
    with pytest.raises(ConfigError, match="bucket"):
        S3Store("archive", bucket, "", S3Settings())


def test_bad_endpoint(s3_bucket: str) -> None:
    """An invalid endpoint is an error of the settings."""
    settings = S3Settings(endpoint="localhost:8333", access_key="a", secret_key="b")
    with pytest.raises(ConfigError, match="endpoint"):
        S3Store("archive", s3_bucket, "", settings).stat("a")


def test_half_a_pair_of_keys(s3_bucket: str) -> None:
    """One key without the other is an error of the settings, and the machine's keys are not used."""
    with pytest.raises(ConfigError, match="secret_key"):
        S3Store("archive", s3_bucket, "", S3Settings(access_key="a"))


def test_profile_gives_the_keys(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store uses the keys of its profile, or else of AWS_PROFILE, and refuses a profile that does not exist."""
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def open_store(profile: str | None) -> S3Store:
        return S3Store("archive", s3_bucket, "", S3Settings(s3_server.endpoint, profile=profile))

    assert keys(open_store("lab")) == keys(S3Store("archive", s3_bucket, "", settings_of(s3_server)))
    with pytest.raises(ConfigError, match="nope"):
        keys(open_store("nope"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    keys(open_store(None))
    with pytest.raises(ConfigError, match="profile"):
        S3Store("archive", s3_bucket, "", settings_of(s3_server, profile="lab"))


def test_explicit_keys_ignore_the_environment(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys in the settings, no AWS variable or file changes keys, profile, region or endpoint."""
    (tmp_path / "config").write_text("[default]\nregion = elsewhere\nendpoint_url = http://127.0.0.1:1\n")
    environment = {"CONFIG_FILE": str(tmp_path / "config"), "PROFILE": "nope", "ACCESS_KEY_ID": "wrong"}
    environment |= {"SECRET_ACCESS_KEY": "wrong", "REGION": "elsewhere", "DEFAULT_REGION": "elsewhere"}
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    store = S3Store("archive", s3_bucket, "explicit", settings_of(s3_server))
    assert store._bucket.client.meta.region_name == "us-east-1"
    put_bytes(store, "object", b"1", ME)


def test_environment_names_no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS_ENDPOINT_URL does not replace Amazon, because the worker compares URLs with the endpoint of the settings."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for settings in (S3Settings(anonymous=True), S3Settings(access_key="a", secret_key="b"), S3Settings()):
        assert "amazonaws.com" in S3Store("archive", "bucket", "", settings)._bucket.client.meta.endpoint_url


def test_environment_gives_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose keys boto3 must find uses the region of the environment, unless its settings name one."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    for settings, expected in (
        (S3Settings(), "eu-central-1"),
        (S3Settings(region="eu-west-3"), "eu-west-3"),
        (S3Settings(anonymous=True), "us-east-1"),
    ):
        assert S3Store("archive", "bucket", "", settings)._bucket.client.meta.region_name == expected


def test_secrets_are_not_shown() -> None:
    """The printed settings show no keys."""
    assert "hush" not in repr(S3Settings(access_key="hush", secret_key="hush"))


def test_a_fork_gets_a_client_of_its_own(store: S3Store) -> None:
    """A child process does not use its parent's client, because it would share its sockets and locks."""
    put_bytes(store, "object", b"1", ME)
    mine = id(store._bucket.client)
    child = os.fork()
    if child == 0:
        os._exit(0 if id(store._bucket.client) != mine and read_bytes(store, "object") == b"1" else 1)
    assert os.waitpid(child, 0)[1] == 0


# A server's answers


def test_missing_bucket_is_said_and_not_made(s3_server: S3Server) -> None:
    """Each method names the missing bucket and its endpoint, and creates no bucket."""
    store = S3Store("archive", "no-such-bucket", "", settings_of(s3_server))
    doors = (
        lambda: put_bytes(store, "a", b"1", ME),
        lambda: get(store, "a"),
        lambda: store.stat("a"),
        lambda: keys(store),
        lambda: store.sweep(0),
    )
    for door in doors:
        with pytest.raises(StoreDenied, match=r"no-such-bucket at http://127\.0\.0\.1"):
            door()
    assert "no-such-bucket" not in str(s3_server.client().list_buckets()["Buckets"])


@pytest.mark.parametrize(
    "wrong",
    [pytest.param({"access_key": "wrong"}, id="access key"), pytest.param({"secret_key": "wrong"}, id="secret key")],
)
def test_wrong_keys(s3_server: S3Server, s3_bucket: str, wrong: dict[str, str]) -> None:
    """Unknown keys are refused permanently with a remedy, for writes and reads."""
    store = S3Store("archive", s3_bucket, "", settings_of(s3_server, **wrong))
    for door in (lambda: put_bytes(store, "a", b"1", ME), lambda: get(store, "a"), lambda: keys(store)):
        with pytest.raises(StoreDenied, match=r"The store (refuses the keys|denies access) .*secret_key") as refused:
            door()
        assert "wrong" not in str(refused.value)


def test_nobody_listens(s3_bucket: str) -> None:
    """A job waits for an endpoint that refuses connections, and no attempt is counted."""
    settings = S3Settings(f"http://127.0.0.1:{free_port()}", access_key="a", secret_key="b", tries=1)
    store = S3Store("archive", s3_bucket, "", settings)
    with pytest.raises(StoreAway, match="endpoint"):
        put_bytes(store, "a", b"1", ME)
    with pytest.raises(StoreAway, match="endpoint"):
        get(store, "a")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (500, "InternalError", StoreUnavailable),
        (503, "SlowDown", StoreAway),
        (503, "ServiceUnavailable", StoreAway),
        (429, "TooManyRequests", StoreAway),
        (400, "RequestTimeout", StoreUnavailable),
        (400, "BadDigest", StoreUnavailable),
        (403, "AccessDenied", StoreDenied),
        (403, "SignatureDoesNotMatch", StoreDenied),
        (403, "RequestTimeTooSkewed", StoreUnavailable),
        (400, "AuthorizationHeaderMalformed", StoreDenied),
        (405, "MethodNotAllowed", StoreDenied),
        (501, "NotImplemented", StoreUnavailable),
        (400, "EntityTooLarge", StoreFull),
        (507, "InsufficientStorage", StoreFull),
        (404, "NoSuchBucket", StoreDenied),
        (404, "XAdminUserNotFound", StoreDenied),
    ],
)
def test_error_map(shaky: S3Store, faulty_s3: FaultyS3, status: int, code: str, kind: type[WorkerError]) -> None:
    """A server's answer has an error class, and the text names store, key and the server's code."""
    faulty_s3.faults = [Fault("PutObject", status, code)]
    with pytest.raises(WorkerError, match="archive:a/object") as refused:
        put(shaky, "a/object", b"small")
    assert type(refused.value) is kind


def test_clock_is_wrong(faulty_s3: FaultyS3, s3_bucket: str, tmp_path: Path) -> None:
    """A worker with a wrong clock gets a temporary error, also from an answer without a reason."""
    clock = Clock(tmp_path, "wrong")
    if not clock.environ:
        missing("a C compiler", "apt install gcc")
    clock.jump(3 * 3600)
    settings = {"endpoint": faulty_s3.endpoint, "access_key": S3Server.access_key, "secret_key": S3Server.secret_key}
    asked = f"open_store('archive', 's3://{s3_bucket}', **{settings}).stat('a/object')"
    script = f"from ssvm_worker.stores import open_store\ntry: {asked}\nexcept Exception as error: print(repr(error))"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env={**os.environ, **clock.environ}, capture_output=True, text=True, check=True)
    assert "StoreUnavailable('The clock of this host or of the store is wrong" in ended.stdout


@pytest.mark.parametrize(
    "call", ["CreateMultipartUpload", "UploadPart 1", "UploadPart 2", "UploadPart 3", "CompleteMultipartUpload"]
)
def test_nothing_is_left_when_a_call_fails(shaky: S3Store, faulty_s3: FaultyS3, call: str) -> None:
    """If any call of an upload fails, the error names the object, and no object or upload is left."""
    faulty_s3.faults = [Fault(call, 503, "SlowDown")]
    with pytest.raises(StoreUnavailable, match="archive:a/object"):
        put(shaky, "a/object", BIG)
    assert (keys(shaky), shaky.sweep(0)) == ([], 0)


def test_passing_errors_are_tried_again(faulty_s3: FaultyS3, s3_bucket: str) -> None:
    """A failed part is sent again, and the object is complete."""
    store = S3Store("archive", s3_bucket, f"again-{next(_NUMBERS)}", settings_of(faulty_s3, tries=2))
    faulty_s3.faults = [Fault("UploadPart 2", 503, "SlowDown", times=1)]
    put(store, "object", BIG)
    assert faulty_s3.names().count("UploadPart 2") == 2
    assert get(store, "object") == BIG


def test_failed_part_surfaces_while_writing(shaky: S3Store, faulty_s3: FaultyS3) -> None:
    """A stream without end is not read further after a failed part, and the error is kept."""
    faulty_s3.faults = [Fault("UploadPart 1")]
    with shaky.writer("object", owner=ME) as sink:
        with pytest.raises(StoreUnavailable):
            fill(sink, BIG * 20)
        with pytest.raises(StoreUnavailable):
            sink.commit()
    assert "CompleteMultipartUpload" not in faulty_s3.names()


def test_lost_answer_to_complete(faulty_s3: FaultyS3, s3_bucket: str) -> None:
    """If the answer to a successful Complete was lost, the next try finds the object."""
    store = S3Store("archive", s3_bucket, f"lost-{next(_NUMBERS)}", settings_of(faulty_s3, tries=2))
    faulty_s3.faults = [Fault("CompleteMultipartUpload", times=1, after=True)]
    put(store, "object", BIG)
    assert get(store, "object") == BIG


def test_swept_upload_is_not_taken_for_an_older_object(store: S3Store) -> None:
    """A swept upload makes no object, even if another object of its size has its key."""
    put(store, "object", BIG)
    with store.writer("object", owner=OTHER) as sink:
        fill(sink, BIG[::-1])
        store.sweep(0)
        with pytest.raises(StoreUnavailable, match="ended by another process"):
            sink.commit()
    assert get(store, "object") == BIG


def test_abort_that_fails_is_left_to_the_sweep(shaky: S3Store, faulty_s3: FaultyS3) -> None:
    """An abort never raises, and a sweep deletes what it could not delete."""
    faulty_s3.faults = [Fault("AbortMultipartUpload", times=1)]
    fill(shaky.writer("object", owner=ME), BIG).abort()
    assert (shaky.sweep(0), shaky.sweep(0)) == (1, 0)


def test_sweep_by_age_counts_from_the_last_part(store: S3Store, s3_server: S3Server) -> None:
    """An upload is as old as its last part, so a long live one is kept."""
    with store.writer("object", owner=OTHER) as sink:
        fill(sink, BIG)
        assert (store.sweep(60), store.sweep(0)) == (0, 1)


def test_cut_body_is_told(shaky: S3Store, faulty_s3: FaultyS3) -> None:
    """A body that ends before its length is a broken source that can be resumed."""
    put(shaky, "object", BIG)
    faulty_s3.faults = [Fault("GetObject", cut_at=3 * CHUNK, times=1)]
    source, got = shaky.reader("object"), list[bytes]()
    with pytest.raises(SourceUnavailable):
        deque(tap(source.open(), got.append), maxlen=0)
    assert b"".join([*got, *source.open(sum(map(len, got)))]) == BIG


def test_reader_beyond_the_end(store: S3Store) -> None:
    """An offset after the end means that the object has changed."""
    put(store, "object", b"four")
    with pytest.raises(WorkerError, match="overwritten"):
        get(store, "object", 5)


def test_small_object_is_one_put(shaky: S3Store, faulty_s3: FaultyS3) -> None:
    """An object smaller than a part uses no multipart upload."""
    put(shaky, "object", BIG[: 5 * MiB - 1])
    assert faulty_s3.names() == ["HeadObject", "PutObject", "HeadObject"]


# Parts


@pytest.mark.parametrize(
    ("hint", "size"),
    [
        pytest.param(1, 8 * MiB, id="never below the least"),
        pytest.param(20 * GiB, 8 * MiB, id="20 GiB"),
        pytest.param(900 * GiB, 900 * GiB // 9000 + 1, id="900 GiB"),
        pytest.param(5 * TiB, 5 * TiB // 9000 + 1, id="the largest object of S3"),
    ],
)
def test_parts_by_the_hint(hint: int, size: int) -> None:
    """Parts are equal and at most 9000, so an object slightly larger than the hint fits."""
    assert part_size(1, 8 * MiB, hint, 0) == size


def total(hint: int | None, parts: int) -> int:
    """Return the bytes of that many parts."""
    sent = 0
    for number in range(1, parts + 1):
        sent += part_size(number, 8 * MiB, hint, sent)
    return sent


def test_parts_of_an_unknown_length() -> None:
    """Without a hint all parts together hold more than 1 TiB, with the smallest size up to 20 GiB."""
    assert total(None, MAX_PARTS) > TiB
    assert part_size(20 * GiB // (8 * MiB), 8 * MiB, None, 20 * GiB) == 8 * MiB
    assert max(part_size(each, 8 * MiB, None, 1) for each in range(1, MAX_PARTS + 1)) <= 5 * GiB


def test_parts_beyond_a_wrong_hint() -> None:
    """A hint that is far too small does not end an upload."""
    assert total(1, MAX_PARTS) > TiB


def test_memory_of_an_upload_is_bounded(store: S3Store) -> None:
    """The parts in transfer and the current one never exceed the memory limit."""
    with store.writer("object", owner=ME) as sink:
        for _ in range(40):
            sink.write(BIG[:CHUNK])
            under_way = len(sink._running) * 5 * MiB
            assert under_way + sink._held <= BUDGET


# Destinations of uploads


def test_destination_takes_the_users_own_key(s3_server: S3Server, s3_bucket: str) -> None:
    """An upload's key may have any characters that S3 allows, such as blanks, dots and umlauts."""
    url = f"s3://{s3_bucket}/exports/.hidden/Größe 10 GB (copy)?.qcow2"
    with s3_destination(url, settings_of(s3_server), len(BIG), ME) as sink:
        fill(sink, BIG).commit()
    path = url.removeprefix(f"s3://{s3_bucket}/")
    assert s3_server.client().get_object(Bucket=s3_bucket, Key=path)["Body"].read() == BIG


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("", id="empty"),
        pytest.param("directory/", id="ends in a slash"),
        pytest.param("a/../b", id="climbs"),
        pytest.param("a\0b", id="NUL"),
        pytest.param("a\nb", id="line break"),
        pytest.param("ä" * 600, id="1200 bytes"),
    ],
)
def test_destination_refuses(key: str) -> None:
    """An unsafe or missing key is refused before any request."""
    with pytest.raises(InvalidRequest, match="BUCKET/KEY"):
        s3_destination(f"s3://bucket/{key}", S3Settings(), 1, ME)


def test_dead_uploads_of_a_destination_are_swept(s3_server: S3Server, s3_bucket: str) -> None:
    """Abandoned uploads of exactly that key are aborted, but not those of a similar key."""
    settings = settings_of(s3_server)
    url = f"s3://{s3_bucket}/swept-{next(_NUMBERS)}"
    with s3_destination(url, settings, None, ME) as dead, s3_destination(f"{url}0", settings, None, ME) as alive:
        fill(dead, BIG)
        fill(alive, BIG).commit()
        assert (sweep_s3_destination(url, settings), sweep_s3_destination(url, settings)) == (1, 0)
        with pytest.raises(StoreUnavailable, match="ended by another process"):
            dead.commit()


def test_an_answer_without_a_code(store: S3Store) -> None:
    """A missing object is distinguished from a missing bucket, although HEAD returns 404 for both."""
    with pytest.raises(ObjectNotFound, match=re.escape(f"{store.name}:a/object")):
        store.stat("a/object")


def test_presigned(store: S3Store) -> None:
    """A presigned URL returns the object under its name, and nothing without its signature."""
    put_bytes(store, "a/disk.raw", b"image", ME)
    url, http = store.presign("a/disk.raw", 60), urllib3.PoolManager()
    found = http.request("GET", url)
    assert (found.data, found.headers["Content-Disposition"]) == (b"image", 'attachment; filename="disk.raw"')
    assert http.request("GET", url.partition("?")[0]).status == 403
