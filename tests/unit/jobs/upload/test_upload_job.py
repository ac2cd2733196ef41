"""The upload job to S3 and to a PUT URL: checked during the upload, and complete at the destination or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.errors import Cancelled, ChecksumMismatch, InvalidRequest, ObjectNotFound, StoreDenied
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.upload import job as upload
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from tests import images
from tests.attempts import attempt
from tests.servers.http import HttpServer
from tests.servers.s3 import S3Server

IMAGE = images.mbr(6 << 20)
KEY = "template/tmpl/2/7/7.raw"


@pytest.fixture
def store(http_server: HttpServer) -> Store:
    """Return a store with one template."""
    store = MemoryStore("primary")
    fields = {"url": http_server.serve("image", IMAGE), "account": "2", "id": "7"}
    download.run(parse_request(download.Request, fields, "download"), attempt(store))
    return store


def request(**fields: Any) -> upload.Request:
    return parse_request(upload.Request, fields, "upload")


def s3_settings(server: S3Server) -> dict[str, Any]:
    keys = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    return {"credentials": {"lab": keys}}


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
@pytest.mark.parametrize("named", [{"key": KEY}, {"kind": "template", "account": "2", "id": "7"}])
def test_upload_to_a_put_url(store: Store, http_server: HttpServer, named: dict[str, str], scheme: str) -> None:
    """An object, named by its key or its artifact, arrives completely at a PUT URL."""
    url = http_server.take("up").replace("http", scheme, 1)
    result = upload.run(request(url=url, **named), attempt(store))

    assert http_server.stored["/up"] == IMAGE
    assert (result["key"], result["size"]) == (KEY, len(IMAGE))


@pytest.mark.parametrize("scheme", ["s3", "S3"])
def test_upload_to_s3(store: Store, s3_server: S3Server, scheme: str) -> None:
    """An object arrives completely at s3://bucket/key, also beside an image store in that bucket."""
    bucket = s3_server.make_bucket()
    settings = s3_settings(s3_server)
    settings["stores"] = {"archive": settings["credentials"]["lab"] | {"url": f"s3://{bucket}/prefix"}}
    trying = attempt(store, settings=settings)

    upload.run(request(key=KEY, url=f"{scheme}://{bucket}/out/disk 1.raw", credentials="lab"), trying)

    body = s3_server.client().get_object(Bucket=bucket, Key="out/disk 1.raw")["Body"]
    assert body.read() == IMAGE


@pytest.mark.parametrize(
    "now", [pytest.param(IMAGE[:-1] + b"!", id="one byte other"), pytest.param(IMAGE[:-1], id="one byte short")]
)
def test_damage_is_not_uploaded(tmp_path: Path, http_server: HttpServer, now: bytes) -> None:
    """An object without its digest is refused, and nothing arrives."""
    damaged = FileStore("primary", tmp_path)
    fields = {"url": http_server.serve("image", IMAGE), "account": "2", "id": "7"}
    download.run(parse_request(download.Request, fields, "download"), attempt(damaged))
    (tmp_path / KEY).write_bytes(now)

    with pytest.raises(ChecksumMismatch, match="damaged"):
        upload.run(request(key=KEY, url=http_server.take("up")), attempt(damaged))

    assert http_server.stored == {}


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        pytest.param({"key": "template/tmpl/2/8/8.raw"}, ObjectNotFound, "no complete template", id="no artifact"),
        pytest.param({"key": "template/tmpl/2/7/8.raw"}, ObjectNotFound, "no such object", id="no such object"),
        pytest.param({"key": "elsewhere/x"}, InvalidRequest, "Invalid prefix|No artifact", id="outside the layout"),
        pytest.param({"key": KEY, "store": "nowhere"}, InvalidRequest, "primary", id="unknown store"),
        pytest.param({"key": KEY, "credentials": "nobody"}, InvalidRequest, "nobody", id="unknown credentials"),
        pytest.param({"key": KEY, "url": "ftp://x/y"}, InvalidRequest, "one of: s3, http", id="unknown scheme"),
        pytest.param({"key": KEY, "url": "s3://"}, InvalidRequest, "s3://", id="no bucket"),
        pytest.param({"key": KEY, "url": "s3://b/k"}, InvalidRequest, "needs credentials", id="no credentials"),
    ],
)
def test_wrong_uploads(store: Store, fields: dict[str, str], error: type[Exception], said: str) -> None:
    """The error of a wrong request lists what exists instead."""
    with pytest.raises(error, match=said):
        upload.run(request(**{"url": "http://127.0.0.1:1/up"} | fields), attempt(store))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"url": "s3://b/k"}, id="nothing named"),
        pytest.param({"key": "../../etc/passwd", "url": "s3://b/k"}, id="key that climbs"),
        pytest.param({"key": KEY}, id="no destination"),
    ],
)
def test_requests_that_are_refused_when_read(fields: dict[str, str]) -> None:
    """An invalid request is refused before any change."""
    with pytest.raises(InvalidRequest):
        request(**fields)


@pytest.mark.parametrize(
    ("download", "allowed", "passes"),
    [
        pytest.param([], None, False, id="nothing is listed"),
        pytest.param(["127.0.0.0/8"], None, True, id="listed for downloads"),
        pytest.param([], ["127.0.0.0/8"], True, id="listed for uploads"),
        pytest.param(["127.0.0.0/8"], [], False, id="none for uploads"),
        pytest.param(["127.0.0.0/8"], ["10.0.0.0/8"], False, id="others for uploads"),
    ],
)
def test_networks_of_uploads(
    store: Store, http_server: HttpServer, download: list[str], allowed: list[str] | None, passes: bool
) -> None:
    """A PUT may use public addresses and listed networks: the uploads' list, or else the downloads'."""
    given = {
        "download": {"allow_networks": download},
        "upload": {"allow_networks": allowed} if allowed is not None else {},
    }
    trying, asked = attempt(store, settings=given), request(key=KEY, url=http_server.take("up"))
    if passes:
        upload.run(asked, trying)
    else:
        with pytest.raises(StoreDenied, match=r"loopback.*upload\.allow_networks"):
            upload.run(asked, trying)
    assert [each.method for each in http_server.requests].count("PUT") == passes


@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]", "[::ffff:169.254.169.254]", "100.100.100.200"])
def test_no_upload_to_metadata_services(store: Store, host: str) -> None:
    """A metadata service is refused even in a listed network."""
    given = {"upload": {"allow_networks": ["0.0.0.0/0", "::/0"]}}
    with pytest.raises(StoreDenied, match="metadata"):
        upload.run(request(key=KEY, url=f"http://{host}/latest/api/token"), attempt(store, settings=given))


def test_refused_by_the_destination(store: Store, http_server: HttpServer) -> None:
    """The error of a refusal has its status, and mentions an expired presigned URL."""
    with pytest.raises(StoreDenied, match="403"):
        upload.run(request(key=KEY, url=http_server.take("up", status=403)), attempt(store))


def test_cancelled_upload(store: Store, s3_server: S3Server) -> None:
    """A cancelled upload leaves neither the object nor an open multipart upload."""
    bucket = s3_server.make_bucket()
    trying = attempt(store, settings=s3_settings(s3_server))
    trying.stop_reason = lambda: "user" if trying.progress.bytes > 3 << 20 else None

    with pytest.raises(Cancelled):
        upload.run(request(key=KEY, url=f"s3://{bucket}/x", credentials="lab"), trying)

    assert s3_server.client().list_objects_v2(Bucket=bucket).get("Contents", []) == []
    assert s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
