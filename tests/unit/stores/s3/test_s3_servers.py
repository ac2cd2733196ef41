"""Three independent S3 servers: the store contract on two, and S3's own features on all."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3

from ssvm_worker.errors import SourceUnavailable, StoreDenied, StoreUnavailable
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.http import HttpOptions
from ssvm_worker.stores.http_put import PutSink
from ssvm_worker.stores.s3 import capabilities
from ssvm_worker.stores.s3.capabilities import Features
from ssvm_worker.stores.s3.client import S3Settings
from ssvm_worker.stores.s3.store import S3Store
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes, tap
from ssvm_worker.units import MiB
from tests.contracts.store import BIG, ME, StoreContract, fill, get, keys, put
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import DOMAIN, S3Server
from tests.servers.s3_faults import FaultyS3
from tests.servers.versity import VersityS3
from tests.servers.wire import Wire

_NUMBERS = itertools.count(1)
#: One key more than a page of a listing.
MANY = 1001


def settings_of(server: S3Server | RcloneS3 | VersityS3, **more: object) -> S3Settings:
    """Return the settings of that server, with the smallest parts that S3 accepts."""
    values = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    ca_file = getattr(server, "ca_file", None)
    return S3Settings(**{"part_size": 5 * MiB, "tries": 1, "ca_file": ca_file, **values, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rclone_bucket(rclone_s3: RcloneS3) -> str:
    """Return a bucket for this module."""
    return rclone_s3.make_bucket()


@pytest.fixture(scope="module")
def versity_bucket(versity_s3: VersityS3) -> str:
    """Return a bucket for this module."""
    return versity_s3.make_bucket()


@pytest.fixture(params=["s3_server", "rclone_s3", "versity_s3"])
def server(request: pytest.FixtureRequest) -> Any:
    """Return each of the servers."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def store(server: Any, request: pytest.FixtureRequest) -> S3Store:
    """Return a store on each server."""
    kinds = {S3Server: "s3_bucket", RcloneS3: "rclone_bucket", VersityS3: "versity_bucket"}
    bucket = request.getfixturevalue(kinds[type(server)])
    return S3Store("archive", bucket, f"own-{next(_NUMBERS)}", settings_of(server))


def calls_of(store: S3Store) -> list[str]:
    """Return a list that grows by the name of each call of the store."""
    calls: list[str] = []
    store._bucket.client.meta.events.register("before-call.s3", lambda model, **_: calls.append(model.name))
    return calls


class TestRcloneStore(StoreContract):
    @pytest.fixture
    def store(self, rclone_s3: RcloneS3, rclone_bucket: str) -> S3Store:
        # It closes the connection with a refusal, which is lost if the part was sent already.
        return S3Store("archive", rclone_bucket, f"test-{next(_NUMBERS)}", settings_of(rclone_s3, tries=4))


class TestVersityStore(StoreContract):
    @pytest.fixture
    def store(self, versity_s3: VersityS3, versity_bucket: str) -> S3Store:
        return S3Store("archive", versity_bucket, f"test-{next(_NUMBERS)}", settings_of(versity_s3))


# Features of a server


@pytest.mark.parametrize("earlier", [None, BIG[1:]], ids=["new", "replaced"])
def test_commit_does_not_wait(store: S3Store, earlier: bytes | None) -> None:
    """A store that shows another ETag than it returned, like rclone, shows the new object without a delay."""
    if earlier:
        put(store, "a/b", earlier)
    calls = calls_of(store)
    put(store, "a/b", BIG)
    assert calls.count("HeadObject") <= 3


def test_features(server: S3Server | RcloneS3 | VersityS3, store: S3Store) -> None:
    """A feature counts only if the server refuses what it must refuse; rclone accepts a wrong checksum."""
    able = not isinstance(server, RcloneS3)
    assert store.features == Features(sha256=able, conditional=able, copies=able)
    assert (keys(store), store.sweep(0)) == ([], 0)


def test_features_are_probed_once(rclone_s3: RcloneS3, tmp_path: Path) -> None:
    """The processes of a host share the probed features, and the bucket is left unchanged."""
    bucket, settings = rclone_s3.make_bucket(), settings_of(rclone_s3, notes_dir=str(tmp_path / "s3"))
    first, later = (S3Store("archive", bucket, "", settings) for _ in range(2))
    assert first.features == Features()
    assert "Contents" not in rclone_s3.client().list_objects_v2(Bucket=bucket)
    capabilities._KNOWN.clear()  # as in another process
    calls = calls_of(later)
    put_bytes(later, "b", b"1", ME)
    assert (later.features, calls) == (Features(), ["HeadBucket", "HeadObject", "PutObject", "HeadObject"])
    assert S3Server.secret_key not in "".join(each.read_text() for each in (tmp_path / "s3").iterdir())


@pytest.mark.parametrize("note", ['{"when": 1, "features": {"sha256": true, "conditional": true}}', "[]", "ä", ""])
def test_notes_that_are_old_or_none(rclone_s3: RcloneS3, tmp_path: Path, note: str) -> None:
    """Notes that are older than a week, or foreign, are ignored."""
    store = S3Store("archive", rclone_s3.make_bucket(), "", settings_of(rclone_s3, notes_dir=str(tmp_path)))
    assert store.features == Features()
    (path,) = tmp_path.iterdir()
    path.write_text(note)
    capabilities._KNOWN.clear()
    assert store.features == Features()
    assert path.read_text() != note


# Names and listings


def test_list_beyond_a_page(store: S3Store, server: Any) -> None:
    """A listing continues after the thousand keys of a page."""
    client, name, root = store._bucket.client, store._bucket.name, store._root
    names = [f"a/{number}" for number in range(MANY)]
    if isinstance(server, VersityS3):  # an object of this server is a file, which costs much less
        (server.root / name / root / "a").mkdir(parents=True)
        for key in names:
            (server.root / name / root / key).touch()
    else:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda key: client.put_object(Bucket=name, Key=root + key, Body=b""), names))
    calls = calls_of(store)
    assert keys(store, "a") == sorted(names)
    assert calls == ["ListObjectsV2"] * 2


def test_keys_that_begin_alike(store: S3Store) -> None:
    """An operation on template 20 of an account does not affect its templates 201 and 2."""
    names = ["template/tmpl/2/20/20.raw", "template/tmpl/2/201/201.raw", "template/tmpl/2/2/2.raw"]
    for key in names:
        put_bytes(store, key, b"1", ME)
    with store.writer("template/tmpl/2/201/open", owner=ME) as beside:
        fill(beside, BIG[: 6 * MiB])
        assert keys(store, "template/tmpl/2/20") == names[:1]
        assert store.sweep(0, "template/tmpl/2/20") == 0
        store.delete(names[0])
        beside.commit()
    assert keys(store) == ["template/tmpl/2/2/2.raw", "template/tmpl/2/201/201.raw", "template/tmpl/2/201/open"]


# Resumption after a worker's death


def left_by(store: S3Store, data: bytes, owner: Owner = ME) -> None:
    """Let an attempt end after it has sent its parts, as a kill does: no abort, and no state in memory."""
    sink = fill(store.writer("a/object", len(BIG), owner=owner), data)
    sink._collect(0)
    store._uploads.clear()


def test_only_what_is_missing_is_sent(store: S3Store) -> None:
    """The parts of a killed attempt are not sent again, and the object is complete."""
    left_by(store, BIG[:-1])
    calls = calls_of(store)
    with store.writer("a/object", len(BIG), owner=Owner(ME.job_id, 2), resume=True) as sink:
        fill(sink, BIG).commit()
    assert calls.count("UploadPart") == 1
    assert calls.count("CreateMultipartUpload") == 0
    assert (get(store, "a/object") == BIG, store.sweep(0)) == (True, 0)


def test_parts_of_something_else_are_not_taken(s3_server: S3Server, s3_bucket: str) -> None:
    """Parts are identified by their bytes: a part with one other byte is sent, for equal number, size and key."""
    store = S3Store("archive", s3_bucket, f"other-{next(_NUMBERS)}", settings_of(s3_server))
    left_by(store, BIG[: 7 * MiB] + b"!" + BIG[7 * MiB + 1 : -1])
    calls = calls_of(store)
    with store.writer("a/object", len(BIG), owner=Owner(ME.job_id, 2), resume=True) as sink:
        fill(sink, BIG).commit()
    assert (calls.count("UploadPart"), get(store, "a/object") == BIG) == (2, True)


def test_an_upload_of_something_else_is_not_kept(store: S3Store) -> None:
    """An attempt that found other bytes deletes the upload, so the next one does not find them."""
    left_by(store, BIG[::-1][:-1])
    with store.writer("a/object", len(BIG), owner=ME, resume=True) as sink:
        with contextlib.suppress(StoreUnavailable):  # rclone refuses other bytes for an existing part
            fill(sink, BIG[: 6 * MiB])
            sink._collect(0)
        sink.suspend()
    assert (keys(store), store.sweep(0)) == ([], 0)


def test_of_several_uploads_one_is_taken(store: S3Store) -> None:
    """Several killed attempts' uploads become one upload or none."""
    for token in (1, 2):
        left_by(store, BIG[:-1], Owner(ME.job_id, token))
    with store.writer("a/object", len(BIG), owner=Owner(ME.job_id, 3), resume=True) as sink:
        fill(sink, BIG).commit()
    assert (get(store, "a/object") == BIG, store.sweep(0)) == (True, 0)


def test_sweep_spares_what_may_be_the_jobs(store: S3Store) -> None:
    """A sweep that spares a job keeps an unknown upload, and one that spares no job aborts it."""
    left_by(store, BIG[: 6 * MiB])
    assert [store.sweep(0, "a", spare=ME.job_id), store.sweep(0, "a")] == [0, 1]


# Authentication


def test_presigned_both_ways(server: S3Server | RcloneS3 | VersityS3, store: S3Store) -> None:
    """A presigned PUT accepts an upload job's object, and a presigned GET returns it, with signature version 4."""
    asked = {"Bucket": store._bucket.name, "Key": f"{store._root}a/object"}
    url = server.client().generate_presigned_url("put_object", Params=asked, ExpiresIn=60)
    settings = HttpOptions(AddressRule(("127.0.0.0/8",)), ca_file=getattr(server, "ca_file", None))
    with PutSink(url, len(BIG), settings) as sink:
        fill(sink, BIG).commit()
    link = store.presign("a/object", 60)
    http = urllib3.PoolManager(ca_certs=getattr(server, "ca_file", None))
    assert http.request("GET", link).data == BIG
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in link


def test_own_authority(rclone_s3: RcloneS3, rclone_bucket: str) -> None:
    """A server without its authority's certificate is not trusted, and the remedy names the setting."""
    store = S3Store("archive", rclone_bucket, "", settings_of(rclone_s3, ca_file=None))
    with pytest.raises(StoreDenied, match="ca_file"):
        put(store, "a", b"1")


def test_certificate_of_another_host(rclone_s3: RcloneS3, rclone_bucket: str) -> None:
    """A server whose certificate has another name is refused, and no job waits for it."""
    endpoint = rclone_s3.endpoint.replace("localhost", "127.0.0.1")
    store = S3Store("archive", rclone_bucket, "", settings_of(rclone_s3, endpoint=endpoint))
    with pytest.raises(StoreDenied, match="another host"):
        put(store, "a", b"1")


def test_one_key_at_two_services(s3_server: S3Server, rclone_s3: RcloneS3) -> None:
    """Two stores with equal keys, bucket and prefix at two services are different stores."""
    stores = []
    for server in (s3_server, rclone_s3):
        server.client().create_bucket(Bucket="same-bucket")
        stores.append(S3Store("archive", "same-bucket", "same", settings_of(server)))
        put_bytes(stores[-1], "object", server.endpoint.encode(), ME)
    assert [read_bytes(each, "object").decode() for each in stores] == [s3_server.endpoint, rclone_s3.endpoint]
    assert stores[0]._bucket.client is not stores[1]._bucket.client


def test_virtual_host_style(faulty_s3: FaultyS3, s3_server: S3Server, s3_bucket: str) -> None:
    """In virtual-host style the bucket's name is in the host's name, and is signed."""
    settings = settings_of(s3_server, endpoint=f"http://{DOMAIN}", addressing="virtual", proxy=faulty_s3.endpoint)
    store = S3Store("archive", s3_bucket, f"virtual-{next(_NUMBERS)}", settings)
    put(store, "a/object", BIG)
    assert (get(store, "a/object") == BIG, keys(store)) == (True, ["a/object"])
    assert {each.headers["host"] for each in faulty_s3.calls} == {f"{s3_bucket}.{DOMAIN}"}


def test_tls_that_breaks_in_a_body(rclone_s3: RcloneS3, rclone_bucket: str) -> None:
    """A TLS error within an object is a broken source, and the rest can be read over another connection."""
    wire = Wire(urlsplit(rclone_s3.endpoint).port or 443)
    store = S3Store("archive", rclone_bucket, "", settings_of(rclone_s3, endpoint=f"https://localhost:{wire.port}"))
    put(store, "a", BIG)
    wire.damaged_after = wire.down + len(BIG) // 2
    reader, got = store.reader("a"), list[bytes]()
    with pytest.raises(SourceUnavailable, match="SSLError"):
        deque(tap(reader.open(), got.append), maxlen=0)
    wire.damaged_after = None
    assert b"".join([*got, *reader.open(sum(map(len, got)))]) == BIG
    wire.close()
