"""Uploads and downloads by URL never reach the objects of an image store, and credentials reach only their hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.errors import ConfigError, InvalidRequest
from ssvm_worker.jobs.connections import SourceRequest
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.upload import job as upload
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stores.s3.store import S3Store
from ssvm_worker.wiring.connections import ConfiguredConnections
from ssvm_worker.wiring.own_stores import refuse_stores
from tests import images
from tests.attempts import SETTINGS, attempt
from tests.contracts.store import get, put
from tests.copies import PLACE, store_artifact
from tests.servers.http import HttpServer
from tests.servers.s3 import S3Server
from tests.unit.stores.s3.test_s3_store import settings_of

KEY = "template/tmpl/victim/1/1.raw"
ENDPOINT = "http://127.0.0.1:8333"


def stores(**more: Any) -> dict[str, Any]:
    """Return settings with a store below a prefix."""
    keys = {"access_key": "a", "secret_key": "b"}
    return {"stores": {"archive": {"url": "s3://bkt/prefix", "endpoint": ENDPOINT} | keys | more}}


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        pytest.param(f"s3://bkt/prefix/{KEY}", ENDPOINT, id="as it is"),
        pytest.param(f"S3://BKT/prefix/{KEY}", ENDPOINT, id="capitals"),
        pytest.param(f"s3://bkt//prefix//{KEY}", ENDPOINT, id="two slashes"),
        pytest.param(f"s3://bkt/./prefix/{KEY}", ENDPOINT, id="a dot"),
        pytest.param(f"s3://bkt/x/../prefix/{KEY}", ENDPOINT, id="up again"),
        pytest.param(f"s3://bkt/prefix%2f{KEY}", ENDPOINT, id="quoted"),
        pytest.param(f"s3://bkt/%70refix/{KEY}", ENDPOINT, id="a quoted letter"),
        pytest.param(f"s3://bkt/prefix%252f{KEY}", ENDPOINT, id="quoted twice"),
        pytest.param("s3://bkt/prefix/.ssvm-probe", ENDPOINT, id="hidden"),
        pytest.param("s3://bkt/prefix/snapshots/2/v/_packs/p", ENDPOINT, id="packs"),
        pytest.param(f"s3://bkt/prefix/{KEY}", "http://localhost:8333", id="another name of the host"),
        pytest.param(f"s3://bkt/prefix/{KEY}", "http://127.1:8333/", id="another form of the address"),
        pytest.param(f"s3://bkt/prefix/{KEY}", "https://127.0.0.1", id="by a proxy of TLS"),
        pytest.param(f"{ENDPOINT}/bkt/prefix/{KEY}", None, id="path style"),
        pytest.param(f"{ENDPOINT}/bkt/prefix/{KEY}?X-Amz-Signature=0", None, id="presigned"),
        pytest.param(f"{ENDPOINT}//bkt/./prefix/%2e/{KEY}", None, id="path style, spelled otherwise"),
        pytest.param(f"{ENDPOINT}/s3/bkt%2Fprefix%2F{KEY}", None, id="below a path, quoted"),
        pytest.param(f"http://bkt.127.0.0.1:8333/prefix/{KEY}", None, id="virtual host"),
        pytest.param(f"https://[::ffff:127.0.0.1]/bkt/prefix/{KEY}", None, id="mapped address"),
        pytest.param(f"http://0.0.0.0:8333/bkt/prefix/{KEY}", None, id="unspecified address"),
    ],
)
def test_spellings_of_a_stores_object(url: str, endpoint: str | None) -> None:
    """A URL of an image store's object is refused in any spelling."""
    with pytest.raises(InvalidRequest, match="archive"):
        refuse_stores(config.parse(stores(), "test"), url, endpoint)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://bkt/prefix/{KEY}",
        f"https://s3.amazonaws.com/bkt/prefix/{KEY}",
        f"https://bkt.s3.amazonaws.com/prefix/{KEY}",
        f"https://bkt.s3.dualstack.eu-west-1.amazonaws.com/prefix/{KEY}",
        f"https://s3-accelerate.amazonaws.com./bkt/prefix/{KEY}",
    ],
)
@pytest.mark.parametrize("endpoint", [None, "https://s3.eu-west-1.amazonaws.com"])
def test_amazon_has_many_hosts(url: str, endpoint: str | None) -> None:
    """Every host of Amazon gives access to the one bucket of that name."""
    with pytest.raises(InvalidRequest, match="archive"):
        refuse_stores(config.parse(stores(endpoint=endpoint), "test"), url)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        pytest.param("s3://bkt/prefixed/x", ENDPOINT, id="a key that begins alike"),
        pytest.param("s3://bkt/out/x", ENDPOINT, id="beside the prefix"),
        pytest.param(f"s3://bkt2/prefix/{KEY}", ENDPOINT, id="another bucket"),
        pytest.param(f"s3://bkt/prefix/{KEY}", "http://127.0.0.1:9000", id="another service of this host"),
        pytest.param(f"s3://bkt/prefix/{KEY}", None, id="Amazon's bucket"),
        pytest.param("http://127.0.0.1:9000/images/debian.qcow2", None, id="another server"),
        pytest.param(f"ftp://127.0.0.1/bkt/prefix/{KEY}", None, id="another protocol"),
        pytest.param("http://[::1/bkt/prefix/x", None, id="no URL"),
    ],
)
def test_what_is_outside(url: str, endpoint: str | None) -> None:
    """A URL outside all image stores is allowed by this check."""
    refuse_stores(config.parse(stores(), "test"), url, endpoint)


def test_a_directory_that_is_a_store(tmp_path: Path) -> None:
    """A file:// URL never reaches a store's directory, even through a link in an allowed directory."""
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    allowed = {"allow_directories": [str(tmp_path)]}
    given = {"stores": {"local": {"url": f"file://{tmp_path}/store"}}, "download": allowed}
    for path in (f"store/{KEY}", f"link/{KEY}", f"x/../store/{KEY}"):
        with pytest.raises(InvalidRequest, match="local"):
            ConfiguredConnections(config.parse(given, "test")).source(
                SourceRequest([f"file://{tmp_path}/{path}"], lambda: None)
            )


# Real jobs against a real server


class Town:
    """A victim's image in an image store, and a job's settings."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        self.store = S3Store("archive", bucket, "prefix", settings_of(server))
        put(self.store, KEY, b"victim's")
        self.url = f"s3://{bucket}/prefix/{KEY}"
        keys = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
        self.settings = SETTINGS | {
            "stores": {"archive": keys | {"url": f"s3://{bucket}/prefix"}},
            "credentials": {"lab": keys},
        }
        self.web = f"{server.endpoint}/{bucket}/prefix/{KEY}"


@pytest.fixture
def town(s3_server: S3Server, s3_bucket: str) -> Town:
    """Return a new town for each test."""
    return Town(s3_server, s3_bucket)


@pytest.mark.parametrize("credentials", [None, "lab", "archive"])
def test_upload_into_a_store(town: Town, credentials: str | None) -> None:
    """An upload with any keys replaces no object of an image store."""
    source: MemoryStore = store_artifact(MemoryStore("primary"), {"7.raw": images.mbr(1 << 20)})
    for url in (town.url, town.web):
        request = upload.Request(key=PLACE.key("7.raw"), url=url, credentials=credentials)
        with pytest.raises(InvalidRequest):
            upload.run(request, attempt(source, settings=town.settings))
        with pytest.raises(InvalidRequest):
            upload.discard(request, attempt(source, settings=town.settings))
    assert get(town.store, KEY) == b"victim's"


@pytest.mark.parametrize("credentials", ["lab", "archive"])
def test_download_out_of_a_store(town: Town, credentials: str | None) -> None:
    """A download or its mirror reads only from image stores that download.allow_stores names."""
    for urls in ({"url": town.url}, {"url": town.web}, {"url": "http://127.0.0.1:1/x", "mirrors": [town.web]}):
        request = download.Request(account="2", id="7", credentials=credentials, **urls)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest):
            download.run(request, attempt(settings=town.settings))


def test_download_out_of_an_allowed_store(town: Town, s3_server: S3Server, s3_bucket: str) -> None:
    """A store in download.allow_stores provides its keys for downloads."""
    image = images.mbr(1 << 20)
    s3_server.client().put_object(Bucket=s3_bucket, Key="shared/image", Body=image)
    settings = town.settings | {"download": SETTINGS["download"] | {"allow_stores": ["archive"]}}
    target = MemoryStore("primary")
    request = download.Request(url=f"s3://{s3_bucket}/shared/image", account="2", id="7", credentials="archive")
    download.run(request, attempt(target, settings=settings))
    assert get(target, "template/tmpl/2/7/7.raw") == image


# Credentials


def named(url: str, given: dict[str, Any]) -> None:
    ConfiguredConnections(config.parse(SETTINGS | {"credentials": {"c": given}}, "test")).source(
        SourceRequest([url], lambda: None, credentials="c")
    )


SECRETS = [
    pytest.param({"username": "joe", "password": "p"}, id="password"),
    pytest.param({"token": "t"}, id="token"),
    pytest.param({"certificate_file": "/dev/null"}, id="certificate"),
    pytest.param({"private_key_file": "/dev/null", "username": "joe"}, id="key"),
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "sftp"])
def test_credentials_without_hosts(http_server: HttpServer, secret: dict[str, Any], scheme: str) -> None:
    """Credentials without hosts are sent to no host by any protocol, and the error names the setting."""
    with pytest.raises(ConfigError, match=r"credentials\.c\.hosts"):
        named(f"{scheme}://127.0.0.1:{http_server.port}/image", secret)
    assert http_server.requests == []


@pytest.mark.parametrize(
    ("hosts", "url", "fits"),
    [
        (["www.example.com"], "https://www.example.com/x", True),
        (["www.example.com"], "https://WWW.example.com.:8443/x", True),
        (["www.example.com:443"], "https://www.example.com/x", True),
        (["www.example.com:443"], "https://www.example.com:8443/x", False),
        (["*.example.com"], "https://a.b.example.com/x", True),
        (["*.example.com"], "https://example.com/x", False),
        (["*.example.com"], "https://example.com.evil.net/x.example.com", False),
        (["*.example.com"], "https://evil.net/?.example.com", False),
        (["[::1]:8443", "::2"], "https://[::1]:8443/x", True),
        (["[::1]:8443", "::2"], "https://[::2]/x", True),
        (["[::1]:8443"], "https://[::1]/x", False),
        (["www.example.com"], "http://www.example.com/x", False),
        (["www.example.com"], "ftp://www.example.com/x", False),
    ],
)
def test_hosts_of_credentials(hosts: list[str], url: str, fits: bool) -> None:
    """Credentials are sent encrypted to their own hosts only, and a request for another host is refused."""
    if fits:
        named(url, {"token": "t", "hosts": hosts})
        return
    with pytest.raises(InvalidRequest):
        named(url, {"token": "t", "hosts": hosts})


def test_credentials_of_an_upload(http_server: HttpServer) -> None:
    """A PUT sends no credentials to a host that is not theirs."""
    source: MemoryStore = store_artifact(MemoryStore("primary"), {"7.raw": images.mbr(1 << 20)})
    settings = {"credentials": {"c": {"token": "t", "hosts": ["*.example.com"]}}}
    request = upload.Request(key=PLACE.key("7.raw"), url=http_server.take("up"), credentials="c")
    with pytest.raises(InvalidRequest, match="not for the host"):
        upload.run(request, attempt(source, settings=settings))
    assert http_server.requests == []


@pytest.mark.parametrize("hosts", [["https://x"], ["user@x"], [""]])
def test_hosts_that_are_none(hosts: list[str]) -> None:
    """A URL instead of a host is an error of the settings."""
    with pytest.raises(ConfigError, match="is not a host"):
        config.parse({"credentials": {"c": {"token": "t", "hosts": hosts}}}, "test")


def test_buckets_of_credentials() -> None:
    """Credentials with buckets are used only for these."""
    keys = {"access_key": "a", "secret_key": "b", "buckets": ["exports-*"]}
    named("s3://exports-1/x", keys)
    with pytest.raises(InvalidRequest, match="not for the bucket"):
        named("s3://private/x", keys)


@pytest.mark.parametrize("given", [{"machine_role": True}, {"profile": "lab"}], ids=str)
def test_keys_of_the_machine_need_buckets(given: dict[str, Any]) -> None:
    """Credentials that use keys of the machine name their buckets, because a sender of requests chooses the bucket."""
    with pytest.raises(ConfigError, match="needs buckets"):
        config.parse({"credentials": {"c": given}}, "test")
    with pytest.raises(ConfigError, match="excludes access_key"):
        config.parse({"credentials": {"c": given | {"buckets": ["b"], "access_key": "a", "secret_key": "b"}}}, "test")


def test_the_profile_of_credentials(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named credentials with a profile upload with its keys, to their buckets only."""
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    source: MemoryStore = store_artifact(MemoryStore("primary"), {"7.raw": images.mbr(1 << 20)})
    given = {"c": {"endpoint": s3_server.endpoint, "profile": "lab", "buckets": [s3_bucket]}}
    request = upload.Request(key=PLACE.key("7.raw"), url=f"s3://{s3_bucket}/by-profile", credentials="c")
    upload.run(request, attempt(source, settings={"credentials": given}))
    with pytest.raises(InvalidRequest, match="not for the bucket"):
        upload.run(request.model_copy(update={"url": "s3://other/x"}), attempt(source, settings={"credentials": given}))


def test_the_role_of_the_machine(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's keys are used only for uploads to buckets that a setting names."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    source: MemoryStore = store_artifact(MemoryStore("primary"), {"7.raw": images.mbr(1 << 20)})
    given: dict[str, Any] = {"endpoint": s3_server.endpoint}
    request = upload.Request(key=PLACE.key("7.raw"), url=f"s3://{s3_bucket}/by-role", credentials="c")
    with pytest.raises(ConfigError, match="no S3 keys"):
        upload.run(request, attempt(source, settings={"credentials": {"c": given}}))
    with pytest.raises(ConfigError, match="machine_role needs buckets"):
        config.parse({"credentials": {"c": given | {"machine_role": True}}}, "test")
    given |= {"machine_role": True, "buckets": [s3_bucket]}
    upload.run(request, attempt(source, settings={"credentials": {"c": given}}))
    other = request.model_copy(update={"url": "s3://other/by-role"})
    with pytest.raises(InvalidRequest, match="not for the bucket"):
        upload.run(other, attempt(source, settings={"credentials": {"c": given}}))
