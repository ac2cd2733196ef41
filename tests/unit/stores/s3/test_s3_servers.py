"""Two S3 servers that know nothing of each other: every store's promises on the second, and S3's own on both."""

from __future__ import annotations

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3

from ssvm_worker.errors import StoreDenied, StoreUnavailable
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.stores.http_put import PutSettings, PutSink
from ssvm_worker.stores.s3 import capabilities
from ssvm_worker.stores.s3.capabilities import Features
from ssvm_worker.stores.s3.client import S3Settings
from ssvm_worker.stores.s3.store import S3Store
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from ssvm_worker.units import MiB
from tests.contracts.store import BIG, ME, StoreContract, fill, get, keys, put
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import DOMAIN, S3Server
from tests.servers.s3_faults import FaultyS3

_NUMBERS = itertools.count(1)
#: One more than a page of a listing has.
MANY = 1001


def settings_of(server: S3Server | RcloneS3, **more: object) -> S3Settings:
    """How to reach that server; the parts are the smallest that S3 takes."""
    values = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    ca_file = getattr(server, "ca_file", None)
    return S3Settings(**{"part_size": 5 * MiB, "tries": 1, "ca_file": ca_file, **values, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rclone_bucket(rclone_s3: RcloneS3) -> str:
    """A bucket of the module's own."""
    return rclone_s3.make_bucket()


@pytest.fixture(params=["s3_server", "rclone_s3"])
def server(request: pytest.FixtureRequest) -> Any:
    """The one, and the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def store(server: Any, request: pytest.FixtureRequest) -> S3Store:
    """A store of the test's own on either."""
    bucket = request.getfixturevalue("s3_bucket" if isinstance(server, S3Server) else "rclone_bucket")
    return S3Store("archive", bucket, f"own-{next(_NUMBERS)}", settings_of(server))


def calls_of(store: S3Store) -> list[str]:
    """Grows by the name of each call that the store makes from now on."""
    calls: list[str] = []
    store._bucket.client.meta.events.register("before-call.s3", lambda model, **_: calls.append(model.name))
    return calls


class TestRcloneStore(StoreContract):
    @pytest.fixture
    def store(self, rclone_s3: RcloneS3, rclone_bucket: str) -> S3Store:
        # It closes the connection with a refusal, which is lost when the part was on its way already.
        return S3Store("archive", rclone_bucket, f"test-{next(_NUMBERS)}", settings_of(rclone_s3, tries=4))


# What a server can do


@pytest.mark.parametrize("earlier", [None, BIG[1:]], ids=["new", "replaced"])
def test_commit_does_not_wait(store: S3Store, earlier: bytes | None) -> None:
    """A store that shows another ETag than it returned, as rclone does, shows the new object at once all the same."""
    if earlier:
        put(store, "a/b", earlier)
    calls = calls_of(store)
    put(store, "a/b", BIG)
    assert calls.count("HeadObject") <= 3


def test_features(server: S3Server | RcloneS3, store: S3Store) -> None:
    """A feature counts only where the server refuses what it must refuse: rclone keeps a wrong checksum."""
    able = isinstance(server, S3Server)
    assert store.features == Features(sha256=able, conditional=able, copies=able)
    assert (keys(store), store.sweep(0)) == ([], 0)


def test_features_are_probed_once(rclone_s3: RcloneS3, tmp_path: Path) -> None:
    """What one process of a host has found out, the others read; the bucket is left as it was."""
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
    """What was noted more than a week ago, or by somebody else, is not believed."""
    store = S3Store("archive", rclone_s3.make_bucket(), "", settings_of(rclone_s3, notes_dir=str(tmp_path)))
    assert store.features == Features()
    (path,) = tmp_path.iterdir()
    path.write_text(note)
    capabilities._KNOWN.clear()
    assert store.features == Features()
    assert path.read_text() != note


# Names and listings


def test_list_beyond_a_page(store: S3Store) -> None:
    """A listing goes on behind the thousand keys that a server gives at once."""
    client, name, root = store._bucket.client, store._bucket.name, store._root
    names = [f"a/{number}" for number in range(MANY)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: client.put_object(Bucket=name, Key=root + key, Body=b""), names))
    calls = calls_of(store)
    assert keys(store, "a") == sorted(names)
    assert calls == ["ListObjectsV2"] * 2


def test_keys_that_begin_alike(store: S3Store) -> None:
    """What is done to template 20 of an account leaves its templates 201 and 2 alone."""
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


# Going on after a worker's death


def left_by(store: S3Store, data: bytes, owner: Owner = ME) -> None:
    """Let an attempt end with its parts sent, as a kill does: nothing is aborted, nobody remembers anything."""
    sink = fill(store.writer("a/object", len(BIG), owner=owner), data)
    sink._collect(0)
    store._uploads.clear()


def test_only_what_is_missing_is_sent(store: S3Store) -> None:
    """The parts that a dead attempt has sent are not sent again, and the object is whole."""
    left_by(store, BIG[:-1])
    calls = calls_of(store)
    with store.writer("a/object", len(BIG), owner=Owner(ME.job_id, 2), resume=True) as sink:
        fill(sink, BIG).commit()
    assert calls.count("UploadPart") == 1
    assert calls.count("CreateMultipartUpload") == 0
    assert (get(store, "a/object") == BIG, store.sweep(0)) == (True, 0)


def test_parts_of_something_else_are_not_taken(s3_server: S3Server, s3_bucket: str) -> None:
    """Parts are known by their bytes: what differs by one is sent, whatever the number, size and key."""
    store = S3Store("archive", s3_bucket, f"other-{next(_NUMBERS)}", settings_of(s3_server))
    left_by(store, BIG[: 7 * MiB] + b"!" + BIG[7 * MiB + 1 : -1])
    calls = calls_of(store)
    with store.writer("a/object", len(BIG), owner=Owner(ME.job_id, 2), resume=True) as sink:
        fill(sink, BIG).commit()
    assert (calls.count("UploadPart"), get(store, "a/object") == BIG) == (2, True)


def test_an_upload_of_something_else_is_not_kept(store: S3Store) -> None:
    """An attempt that found other bytes leaves nothing to the next one, which else would find them too."""
    left_by(store, BIG[::-1][:-1])
    with store.writer("a/object", len(BIG), owner=ME, resume=True) as sink:
        with contextlib.suppress(StoreUnavailable):  # rclone takes no other bytes for a part that it has
            fill(sink, BIG[: 6 * MiB])
            sink._collect(0)
        sink.suspend()
    assert (keys(store), store.sweep(0)) == ([], 0)


def test_of_several_uploads_one_is_taken(store: S3Store) -> None:
    """What several dead attempts have left is one upload afterwards, or none."""
    for token in (1, 2):
        left_by(store, BIG[:-1], Owner(ME.job_id, token))
    with store.writer("a/object", len(BIG), owner=Owner(ME.job_id, 3), resume=True) as sink:
        fill(sink, BIG).commit()
    assert (get(store, "a/object") == BIG, store.sweep(0)) == (True, 0)


def test_sweep_spares_what_may_be_the_jobs(store: S3Store) -> None:
    """A sweep that spares a job leaves an upload of an unknown process alone; one that spares nobody does not."""
    left_by(store, BIG[: 6 * MiB])
    assert [store.sweep(0, "a", spare=ME.job_id), store.sweep(0, "a")] == [0, 1]


# Getting in


def test_presigned_both_ways(server: S3Server | RcloneS3, store: S3Store) -> None:
    """A presigned PUT takes what an upload job sends, a presigned GET gives it, both by version 4 of the signature."""
    asked = {"Bucket": store._bucket.name, "Key": f"{store._root}a/object"}
    url = server.client().generate_presigned_url("put_object", Params=asked, ExpiresIn=60)
    settings = PutSettings(AddressRule(("127.0.0.0/8",)), ca_file=getattr(server, "ca_file", None))
    with PutSink(url, len(BIG), settings) as sink:
        fill(sink, BIG).commit()
    link = store.presign("a/object", 60)
    http = urllib3.PoolManager(ca_certs=getattr(server, "ca_file", None))
    assert http.request("GET", link).data == BIG
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in link


def test_own_authority(rclone_s3: RcloneS3, rclone_bucket: str) -> None:
    """Without its authority's certificate a server is not trusted, and the remedy names the setting."""
    store = S3Store("archive", rclone_bucket, "", settings_of(rclone_s3, ca_file=None))
    with pytest.raises(StoreDenied, match="ca_file"):
        put(store, "a", b"1")


def test_one_key_at_two_services(s3_server: S3Server, rclone_s3: RcloneS3) -> None:
    """Two stores with the same keys, bucket and prefix at two services are two stores."""
    stores = []
    for server in (s3_server, rclone_s3):
        server.client().create_bucket(Bucket="same-bucket")
        stores.append(S3Store("archive", "same-bucket", "same", settings_of(server)))
        put_bytes(stores[-1], "object", server.endpoint.encode(), ME)
    assert [read_bytes(each, "object").decode() for each in stores] == [s3_server.endpoint, rclone_s3.endpoint]
    assert stores[0]._bucket.client is not stores[1]._bucket.client


def test_virtual_host_style(faulty_s3: FaultyS3, s3_server: S3Server, s3_bucket: str) -> None:
    """Told so, the bucket's name stands in the host's name, and is signed there."""
    settings = settings_of(s3_server, endpoint=f"http://{DOMAIN}", addressing="virtual", proxy=faulty_s3.endpoint)
    store = S3Store("archive", s3_bucket, f"virtual-{next(_NUMBERS)}", settings)
    put(store, "a/object", BIG)
    assert (get(store, "a/object") == BIG, keys(store)) == (True, ["a/object"])
    assert {each.headers["host"] for each in faulty_s3.calls} == {f"{s3_bucket}.{DOMAIN}"}
