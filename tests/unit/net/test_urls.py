"""Users' URLs and headers are sent unchanged or refused, and a log never contains their secrets."""

from __future__ import annotations

import dataclasses

import pytest

from ssvm_worker.errors import InvalidRequest, SourceNotFound
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources import open_source
from ssvm_worker.sources.options import HttpSettings, SourceOptions
from tests.contracts.source import gather
from tests.servers.http import HttpServer

LOOPBACK = SourceOptions(HttpSettings(AddressRule(("127.0.0.0/8",))))


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("dict://example.org/x", id="dict"),
        pytest.param("ldap://example.org/x", id="ldap"),
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("data:,x", id="data"),
        pytest.param("image.qcow2", id="no scheme"),
        pytest.param("", id="empty"),
        pytest.param("http:///x", id="no host"),
        pytest.param("http://exa mple.org/", id="blank in the host"),
        pytest.param("http://example.org:99999/", id="port out of range"),
        pytest.param("http://[::1/", id="bracket open"),
        pytest.param("http://a..b/", id="empty label"),
        pytest.param("http://.a/", id="empty first label"),
        pytest.param("http://./", id="no label"),
        pytest.param("http://" + "a" * 64 + ".example/", id="label of 64 letters"),
        pytest.param("http://h\ud800/x", id="surrogate in the host"),
        pytest.param("http://example.org/\udfff?q=\ud800", id="surrogate in the path"),
        pytest.param("http://example.org/\r\nX: y", id="line break"),
        pytest.param("http://good.example\\.evil.example/", id="backslash in the host"),
        pytest.param("http://" + "ä" * 100 + ".example/", id="host too long for IDNA"),
    ],
)
def test_bad_url(url: str) -> None:
    """A malformed URL is an error of the request."""
    with pytest.raises(InvalidRequest):
        open_source(url, LOOPBACK)


def test_unknown_scheme() -> None:
    """The error of an unknown scheme lists the supported schemes."""
    with pytest.raises(InvalidRequest, match="http, https"):
        open_source("gopher://example.org/", LOOPBACK)


def test_userinfo() -> None:
    """A password in the URL is refused, and no text shows it."""
    with pytest.raises(InvalidRequest) as caught:
        open_source("https://joe:secret@example.org/x?token=secret", LOOPBACK)
    assert "secret" not in repr(caught.value)


def test_password_that_looks_like_a_port() -> None:
    """No error repeats the text in the place of a port."""
    with pytest.raises(InvalidRequest) as caught:
        open_source("http://user:secret/x", LOOPBACK)
    assert "secret" not in repr(caught.value)


def test_name_is_redacted() -> None:
    """The name of a source shows no value of its query."""
    it = open_source("https://s3.example:8443/b/k?X-Amz-Signature=secret&versionId=secret&secret", LOOPBACK)
    assert it.name == "https://s3.example:8443/b/k?X-Amz-Signature=***&versionId=***&***"


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"X Y": "a"}, {"": "a"}, {"Range": "bytes=0-"}, {"host": "x"}])
def test_bad_headers(headers: dict[str, str]) -> None:
    """A header that injects another one, or that the worker sets, is refused."""
    with pytest.raises(InvalidRequest):
        open_source("http://example.org/", dataclasses.replace(LOOPBACK, headers=headers))


def test_awkward_path(http_server: HttpServer) -> None:
    """Blanks and non-ASCII letters are quoted once, and quoted text stays."""
    with pytest.raises(SourceNotFound):
        gather(open_source(http_server.url("a b/ü%20%2F?q=ö r"), LOOPBACK))
    assert http_server.requests[0].path == "/a%20b/%C3%BC%20%2F?q=%C3%B6%20r"
