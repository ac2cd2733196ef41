"""Stores and destinations by the scheme of their URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssvm_worker.errors import ConfigError, InvalidRequest
from ssvm_worker.stores import open_destination, open_store, sweep_destination
from ssvm_worker.stores.http_put import PutSink
from tests.contracts.store import BIG, ME, fill, get, put
from tests.servers.s3 import S3Server


def values_of(server: S3Server) -> dict[str, object]:
    """Return plain values, as the settings have them."""
    return {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}


def test_file(tmp_path: Path) -> None:
    """A file URL is a directory, and the values for S3 are ignored."""
    (tmp_path / "with blank").mkdir()
    store = open_store("local", f"file://{tmp_path}/with%20blank", endpoint=None, region="us-east-1")
    put(store, "object", b"1")
    assert (tmp_path / "with blank/object").read_bytes() == b"1"
    assert store.name == "local"


def test_s3(s3_server: S3Server, s3_bucket: str) -> None:
    """An s3 URL is a bucket and a prefix, with the given values."""
    store = open_store("archive", f"s3://{s3_bucket}/pre/fix", **values_of(s3_server))
    put(store, "object", b"1")
    assert s3_server.client().get_object(Bucket=s3_bucket, Key="pre/fix/object")["Body"].read() == b"1"
    assert get(store, "object") == b"1"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        pytest.param("gs://bucket", "file, nfs, s3", id="unknown scheme"),
        pytest.param("/srv/secondary", "file, nfs, s3", id="a bare path"),
        pytest.param("file:///", "absolute", id="the root of the machine"),
        pytest.param("file://relative/path", "absolute", id="a host where a path should be"),
        pytest.param("s3://", "bucket", id="no bucket"),
        pytest.param("s3://bucket/../x", "letters", id="a prefix that climbs"),
    ],
)
def test_refused_store(url: str, text: str) -> None:
    """The error of an unsupported URL names the store and the supported schemes."""
    with pytest.raises(ConfigError, match=text):
        open_store("primary", url)


def test_unknown_value() -> None:
    """The error of an unknown value for S3 names it."""
    with pytest.raises(ConfigError, match="endpiont"):
        open_store("archive", "s3://bucket", endpiont="http://x")


def test_destination_in_a_bucket(s3_server: S3Server, s3_bucket: str) -> None:
    """An upload to s3 uses exactly the given key, and leaves nothing open."""
    url = f"s3://{s3_bucket}/exports/disk.qcow2"
    with open_destination(url, len(BIG), owner=ME, rule=None, http_ca_file=None, **values_of(s3_server)) as sink:
        fill(sink, BIG).commit()
    assert s3_server.client().head_object(Bucket=s3_bucket, Key="exports/disk.qcow2")["ContentLength"] == len(BIG)
    assert sweep_destination(url, **values_of(s3_server)) == 0


def test_destination_by_put() -> None:
    """An http URL is a PUT destination, and has nothing to sweep."""
    assert isinstance(open_destination("http://127.0.0.1:9/x", 1, owner=ME), PutSink)
    assert sweep_destination("http://127.0.0.1:9/x") == 0


def test_refused_destination() -> None:
    """The error of another scheme lists the supported ones."""
    with pytest.raises(InvalidRequest, match="s3://BUCKET/KEY"):
        open_destination("ftp://host/x", 1, owner=ME)
