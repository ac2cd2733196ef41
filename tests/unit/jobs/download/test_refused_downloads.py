"""Bad network input to a job: each row gives its error, and nothing is stored."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.errors import (
    ChecksumMismatch,
    InvalidRequest,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    TooLarge,
    UnknownFormat,
    WorkerError,
)
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.wiring.assembly import make_attempt
from tests import images
from tests.attempts import attempt
from tests.servers.http import HttpServer

IMAGE = images.mbr(1 << 20)


def run(url: str, settings: dict[str, Any] | None = None, **fields: Any) -> MemoryStore:
    """Return the store after a download, which must be empty after a failure."""
    store = MemoryStore("primary")
    given = {"url": url, "account": 2, "id": "7"} | fields
    request, trying = parse_request(download.Request, given, "download"), attempt(store, settings=settings)
    try:
        download.run(request, trying)
    except WorkerError:
        download.discard(request, trying)
        assert not list(store.list())
        assert not store.sweep(0)
        raise
    return store


STRICT: dict[str, Any] = {"download": {"allow_networks": []}}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "169.254.169.254",
        "[fd00:ec2::254]",
        "100.64.0.1",
        "10.0.0.1",
        "192.168.0.1",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fec0::1]",
        "224.0.0.1",
        "[ff02::1]",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "sftp"])
def test_address(scheme: str, host: str) -> None:
    """A non-public address in any notation and scheme is refused permanently, and no packet is sent."""
    given = {
        "credentials": {"me": {"username": "joe", "hosts": ["*"], "allow_plaintext": True}},
        "download": STRICT["download"] | {"known_hosts": "/dev/null"},
    }
    with pytest.raises(SourceDenied, match=r"download\.allow_networks"):
        run(f"{scheme}://{host}/image", given, credentials="me")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "dict://127.0.0.1/x",
        "gopher://127.0.0.1/x",
        "data:,x",
        "ldap://127.0.0.1/x",
        "jar:http://127.0.0.1!/x",
        "store:primary/x",
        "json:{}",
        "http://user:secret@127.0.0.1/x",
        "ftp://user:secret@127.0.0.1/x",
        "sftp://user:secret@127.0.0.1/x",
        "http://user@127.0.0.1/x",
    ],
)
def test_scheme(url: str) -> None:
    """An unsupported scheme, or a URL with a user name, is an error of the request."""
    with pytest.raises(InvalidRequest) as caught:
        run(url)
    assert "secret" not in str(caught.value)


PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>" + b" " * 4096


@pytest.mark.parametrize(
    ("data", "behaviour", "error"),
    [
        pytest.param(PAGE, {}, UnknownFormat, id="HTML with status 200"),
        pytest.param(b"", {}, SourceNotFound, id="empty"),
        pytest.param(IMAGE, {"status": 204}, SourceNotFound, id="status 204"),
        pytest.param(IMAGE, {"content_length": str(len(IMAGE) - 1)}, ChecksumMismatch, id="longer than its length"),
        pytest.param(
            IMAGE,
            {"content_length": str(len(IMAGE) + 1), "ranges": False},
            SourceUnavailable,
            id="shorter than its length",
        ),
        pytest.param(IMAGE, {"headers": {"Content-Length": "1, 2"}}, SourceUnavailable, id="two lengths"),
        pytest.param(IMAGE, {"content_length": "-1"}, SourceUnavailable, id="negative length"),
        pytest.param(IMAGE, {"chunked": True, "cut_after": 1000}, SourceUnavailable, id="chunked, cut"),
        pytest.param(IMAGE, {"cut_after": 1000, "reset": True, "ranges": False}, SourceUnavailable, id="reset"),
        pytest.param(IMAGE, {"stall_after": 1000, "ranges": False}, SourceUnavailable, id="stall"),
        pytest.param(IMAGE[::-1], {}, ChecksumMismatch, id="other bytes"),
        pytest.param(IMAGE * 3, {}, TooLarge, id="larger than allowed"),
        pytest.param(IMAGE * 3, {"chunked": True}, TooLarge, id="larger than allowed, length unknown"),
    ],
)
def test_body(http_server: HttpServer, data: bytes, behaviour: dict[str, Any], error: type[WorkerError]) -> None:
    """An incomplete or wrong body is never stored, and the error says if a retry may help."""
    given = {"download": {"allow_networks": ["127.0.0.0/8"], "stall_s": 0.5}}
    checksum = hashlib.sha256(IMAGE).hexdigest() if data is not PAGE else None
    with pytest.raises(error):
        run(http_server.serve("image", data, **behaviour), given, checksum=checksum, max_bytes=2 * len(IMAGE))


@pytest.mark.parametrize(
    "checksum",
    ["sha256:xyz", "0" * 63, "crc32:00000000", "sha256:" + "g" * 64, "file:///etc/passwd", "{SHA-256}", ""],
)
def test_checksum(checksum: str) -> None:
    """An invalid checksum is an error of the request, before any fetch."""
    with pytest.raises(InvalidRequest, match="checksum"):
        run("http://127.0.0.1:1/image", checksum=checksum)


@pytest.mark.parametrize("form", ["{}", "md5:{}", "{{MD5}}{}"])
def test_weak_checksum(tmp_path: Path, form: str) -> None:
    """If the settings exclude MD5, an MD5 in any form is refused before any fetch."""
    given = {"download": {"checksums": "sha256,sha512"}, "stores": {"primary": {"url": f"file://{tmp_path}"}}}
    checksum = form.format("0" * 32)
    fields = {"url": "http://127.0.0.1:1/image", "account": "2", "id": "7", "checksum": checksum}
    request = parse_request(download.Request, fields, "download")
    with pytest.raises(InvalidRequest, match=r"md5 checksums are disabled.*Give one of sha256, sha512"):
        download.run(request, make_attempt(config.parse(given, "test"), "job"))


def test_content_encoding(http_server: HttpServer) -> None:
    """An image with a Content-Encoding is stored as it was sent, as its checksum requires."""
    url = http_server.serve("image", IMAGE, headers={"Content-Encoding": "gzip"})
    store = run(url, checksum=hashlib.sha256(IMAGE).hexdigest())
    assert read_bytes(store, "template/tmpl/2/7/7.raw") == IMAGE


def test_encoded_on_the_way(http_server: HttpServer) -> None:
    """An unrequested encoding is counted as sent, decoded once, and refused if the content differs."""
    encoded = gzip.compress(IMAGE)
    url = http_server.serve("image", encoded, headers={"Content-Encoding": "gzip"})
    assert read_bytes(run(url), "template/tmpl/2/7/7.raw") == IMAGE
    run(url, checksum=hashlib.sha256(encoded).hexdigest())
    with pytest.raises(ChecksumMismatch):
        run(url, checksum=hashlib.sha256(IMAGE).hexdigest())


def test_nobody_gets_what_another_has_fetched(http_server: HttpServer) -> None:
    """The same URL for another account is fetched again, because rights are not shared."""
    url = http_server.serve("image", IMAGE)
    store = MemoryStore("primary")
    for account in ("2", "3"):
        given = {"url": url, "account": account, "id": "7", "checksum": hashlib.sha256(IMAGE).hexdigest()}
        download.run(parse_request(download.Request, given, "download"), attempt(store))
    assert len(http_server.requests) == 2


@pytest.mark.parametrize("path", ["..%2f..%2fetc%2fpasswd", "x" * 2000, "a%00b", "%2e%2e", "-rf", "%0a%0d"])
def test_names(http_server: HttpServer, path: str) -> None:
    """A URL's or a server's file name never becomes a name in the store."""
    sent = {"Content-Disposition": 'attachment; filename="../../x"'}
    store = run(http_server.serve(path, IMAGE, headers=sent))
    assert sorted(each.key for each in store.list()) == [
        "template/tmpl/2/7/7.raw",
        "template/tmpl/2/7/manifest.json",
        "template/tmpl/2/7/template.properties",
    ]
