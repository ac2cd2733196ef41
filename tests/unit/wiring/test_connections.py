"""Parts of a source from settings and requests: credentials, certificates, directories and stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trustme

from ssvm_worker.demo.s3 import S3Server
from ssvm_worker.errors import (
    ConfigError,
    InvalidRequest,
    SourceChanged,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
)
from ssvm_worker.jobs.connections import SourceRequest
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.sources.file import FileSource, FileVersion
from ssvm_worker.sources.options import SourceOptions
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from tests import images
from tests.attempts import SETTINGS, attempt
from tests.contracts.source import DATA, SourceContract, gather
from tests.servers.http import HttpServer
from tests.servers.proxy import ProxyServer

IMAGE = images.mbr(1 << 20)
OWNER = Owner()


def run(url: str, settings: dict[str, Any], **fields: Any) -> bytes:
    """Return what a download of that URL stores."""
    request = {"url": url, "account": 2, "id": "7"} | fields
    store = MemoryStore("primary")
    download.run(parse_request(download.Request, request, "download"), attempt(store, settings=settings))
    return read_bytes(store, "template/tmpl/2/7/7.raw")


def test_proxy_of_the_settings(http_server: HttpServer) -> None:
    """A job uses the configured proxy, except for hosts in no_proxy."""
    proxy = ProxyServer()
    http_server.serve("image", IMAGE)
    settings = SETTINGS["download"] | {"proxy": f"http://127.0.0.1:{proxy.port}", "no_proxy": ["127.0.0.1"]}
    try:
        assert run(http_server.url("image", host="image.example"), {"download": settings}) == IMAGE
        assert proxy.asked == [f"GET http://image.example:{http_server.port}/image"]
        assert run(http_server.url("image"), {"download": settings}) == IMAGE
        assert len(proxy.asked) == 1
    finally:
        proxy.close()


# Credentials by name


@pytest.mark.parametrize(
    ("credentials", "header"),
    [
        pytest.param({"username": "joe", "password": "secret"}, "Basic am9lOnNlY3JldA==", id="basic"),
        pytest.param({"username": "joe"}, "Basic am9lOg==", id="no password"),
        pytest.param({"token": "abc"}, "Bearer abc", id="bearer"),
    ],
)
def test_credentials(http_server: HttpServer, credentials: dict[str, str], header: str) -> None:
    """The credentials of the request are sent as the corresponding header."""
    url = http_server.serve("image", IMAGE)
    named = credentials | {"hosts": ["127.0.0.1"], "allow_plaintext": True}
    assert run(url, {"credentials": {"customer": named}}, credentials="customer") == IMAGE
    assert http_server.requests[0].headers["Authorization"] == header


def test_unknown_credentials(http_server: HttpServer) -> None:
    """An unknown name of credentials is an error of the request that lists the known names."""
    with pytest.raises(InvalidRequest, match="customer"):
        run(http_server.url("image"), {"credentials": {"customer": {"token": "t"}}}, credentials="other")


def client_certificate(authority: trustme.CA, directory: Path) -> str:
    path = directory / "client.pem"
    authority.issue_cert("worker.example").private_key_and_cert_chain_pem.write_to_path(str(path))
    return str(path)


def test_client_certificate(https_server: HttpServer, tmp_path: Path) -> None:
    """Credentials may contain an authority and a client certificate for the server."""
    authority = trustme.CA()
    certificate = client_certificate(authority, tmp_path)
    ca_file = https_server.ca_file(tmp_path)
    named: dict[str, Any] = {"ca_file": ca_file, "certificate_file": certificate, "hosts": ["*"]}
    assert https_server.context
    authority.configure_trust(https_server.context)
    https_server.context.verify_mode = 2  # type: ignore[assignment]  # ssl.CERT_REQUIRED
    url = https_server.serve("image", IMAGE)
    assert run(url, {"credentials": {"customer": named}}, credentials="customer") == IMAGE
    with pytest.raises((SourceUnavailable, SourceDenied)):
        run(url, {"credentials": {"customer": {"ca_file": named["ca_file"]}}}, credentials="customer")


def test_client_certificate_is_for_its_origin(https_server: HttpServer, tmp_path: Path) -> None:
    """After a redirect to another origin, the client certificate is not sent, though that server is trusted."""
    authority, elsewhere = trustme.CA(), HttpServer(tls=True)
    both = tmp_path / "both.pem"
    both.write_text("".join(Path(each.ca_file(tmp_path)).read_text() for each in (https_server, elsewhere)))
    named = {"certificate_file": client_certificate(authority, tmp_path), "hosts": ["*"]}
    settings = {"download": SETTINGS["download"] | {"ca_file": str(both)}, "credentials": {"customer": named}}
    assert elsewhere.context
    authority.configure_trust(elsewhere.context)
    elsewhere.context.verify_mode = 2  # type: ignore[assignment]  # ssl.CERT_REQUIRED
    target = elsewhere.serve("image", IMAGE)
    assert run(target, settings, credentials="customer") == IMAGE
    with pytest.raises((SourceUnavailable, SourceDenied)):
        run(https_server.redirect("image", target), settings, credentials="customer")
    elsewhere.close()


def test_authority_of_credentials_is_for_their_origin(https_server: HttpServer, tmp_path: Path) -> None:
    """The authority of credentials is trusted only for the URL's own origin."""
    named = {"credentials": {"customer": {"ca_file": https_server.ca_file(tmp_path)}}}
    elsewhere = HttpServer(tls=True)
    elsewhere.context = https_server.context
    elsewhere.serve("image", IMAGE)
    url = https_server.redirect("image", elsewhere.url("image"))
    with pytest.raises(SourceDenied, match="not trusted"):
        run(url, named, credentials="customer")
    elsewhere.close()


def test_bad_client_certificate(https_server: HttpServer, tmp_path: Path) -> None:
    """A file without certificate and key is an error of the settings."""
    ca_file = https_server.ca_file(tmp_path)
    named: dict[str, Any] = {"ca_file": ca_file, "certificate_file": ca_file, "hosts": ["*"]}
    with pytest.raises(ConfigError, match="Certificate and key"):
        run(https_server.url("image"), {"credentials": {"customer": named}}, credentials="customer")


# file://


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    """Return an allowed directory."""
    path = tmp_path / "incoming"
    path.mkdir()
    return path


def file_source(path: Path, *allowed: Path, version: FileVersion | None = None) -> FileSource:
    return FileSource(f"file://{path}", SourceOptions(directories=allowed), version)


class TestFileSource(SourceContract):
    @pytest.fixture
    def source(self, incoming: Path) -> FileSource:
        (incoming / "image").write_bytes(DATA)
        return file_source(incoming / "image", incoming)

    @pytest.fixture
    def missing(self, incoming: Path) -> FileSource:
        return file_source(incoming / "nothing", incoming)


def test_file_job(incoming: Path) -> None:
    """A download from an allowed directory succeeds."""
    (incoming / "an image").write_bytes(IMAGE)
    allowed = {"download": SETTINGS["download"] | {"allow_directories": [str(incoming)]}}
    assert run(f"file://{incoming}/an%20image", allowed) == IMAGE


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://{incoming}",
        "file://{incoming}/",
        "file://{incoming}/../secret",
        "file://{incoming}/%2e%2e/secret",
        "file://{incoming}2/secret",
        "file://server{incoming}/image",
        "file://{incoming}/image%00",
        "file:{incoming}/image?x",
        "file:image",
    ],
)
def test_file_outside(incoming: Path, url: str) -> None:
    """A path that is not plain, or outside the allowed directories, is an error of the request."""
    with pytest.raises(InvalidRequest):
        FileSource(url.replace("{incoming}", str(incoming)), SourceOptions(directories=(incoming,)))


def test_no_directory_is_allowed_by_itself() -> None:
    """Without the setting, file:// is refused."""
    with pytest.raises(InvalidRequest, match="allow_directories"):
        run("file:///etc/hostname", {})


def link(incoming: Path, secret: Path) -> str:
    (incoming / "image").symlink_to(secret)
    return "image"


def link_above(incoming: Path, secret: Path) -> str:
    (incoming / "below").symlink_to(secret.parent)
    return f"below/{secret.name}"


def pipe(incoming: Path, _: Path) -> str:
    os.mkfifo(incoming / "image")
    return "image"


def directory(incoming: Path, _: Path) -> str:
    (incoming / "image").mkdir()
    return "image"


@pytest.mark.parametrize("trap", [link, link_above, pipe, directory])
def test_file_traps(incoming: Path, tmp_path: Path, trap: Any) -> None:
    """Links are not followed in any component, and only regular files are read."""
    secret = tmp_path / "secret"
    secret.write_bytes(DATA)
    with pytest.raises((SourceDenied, SourceNotFound)):
        gather(file_source(incoming / trap(incoming, secret), incoming))


def test_file_changed(incoming: Path) -> None:
    """A file that has changed is not resumed."""
    path = incoming / "image"
    path.write_bytes(DATA)
    first = file_source(path, incoming)
    gather(first)
    path.write_bytes(DATA[::-1])
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceChanged):
        gather(file_source(path, incoming, version=first.validator), 1000)


# Stores and S3


def settings_with(tmp_path: Path, *allowed: str) -> dict[str, Any]:
    stores = {"primary": {"url": f"file://{tmp_path}"}, "other": {"url": f"file://{tmp_path}"}}
    return {"stores": stores, "download": SETTINGS["download"] | {"allow_stores": allowed}}


def test_store(tmp_path: Path) -> None:
    """An object of a listed store can be downloaded."""
    put_bytes(FileStore("other", tmp_path), "a/image", IMAGE, OWNER)
    assert run("store:other/a/image", settings_with(tmp_path, "other")) == IMAGE


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("store:primary/a/image", InvalidRequest),
        ("store:nothing/a/image", InvalidRequest),
        ("store:other/../image", InvalidRequest),
        ("store:other/a/nothing", SourceNotFound),
    ],
)
def test_store_refused(tmp_path: Path, url: str, error: type[Exception]) -> None:
    """An unlisted store, an invalid key and a missing object are refused."""
    with pytest.raises(error):
        run(url, settings_with(tmp_path, "other"))


def s3_settings(server: S3Server) -> dict[str, Any]:
    keys = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    return {"credentials": {"customer": keys}}


@pytest.fixture
def s3_object(s3_server: S3Server, s3_bucket: str) -> str:
    """Return an image in S3."""
    from ssvm_worker.stores import open_store

    keys = s3_settings(s3_server)["credentials"]["customer"]
    put_bytes(open_store("x", f"s3://{s3_bucket}", **keys), "a/image", IMAGE, OWNER)
    return f"s3://{s3_bucket}/a/image"


def test_s3(s3_server: S3Server, s3_object: str) -> None:
    """An S3 object is downloaded with the endpoint and the keys of named credentials."""
    assert run(s3_object, s3_settings(s3_server), credentials="customer") == IMAGE


def test_s3_missing(s3_server: S3Server, s3_object: str) -> None:
    """A missing S3 object gives a source's error."""
    with pytest.raises(SourceNotFound):
        run(s3_object + "2", s3_settings(s3_server), credentials="customer")


def test_s3_without_keys(s3_server: S3Server, s3_object: str) -> None:
    """Credentials with only an endpoint send unsigned requests, which read public objects."""
    with pytest.raises(SourceDenied):
        run(s3_object, {"credentials": {"customer": {"endpoint": s3_server.endpoint}}}, credentials="customer")


def test_s3_without_credentials() -> None:
    """Without credentials, requests to Amazon are anonymous, even if a configured store uses that bucket."""
    store = {"url": "s3://bucket", "endpoint": "http://127.0.0.1:1", "access_key": "a", "secret_key": "b"}
    doors = attempt(settings={"stores": {"primary": store}}).services.connections
    source = doors.source(SourceRequest(["s3://bucket/key"], lambda: None))
    assert "Amazon S3" in source.name


def test_s3_of_nobody() -> None:
    """A URL without a key is an error of the request."""
    with pytest.raises(InvalidRequest):
        run("s3://bucket/", {})
