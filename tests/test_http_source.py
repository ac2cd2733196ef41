"""Downloads over HTTP: whole, or a clear error; and resumed only where it is the same object."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ssvm_worker.addresses import AddressRule
from ssvm_worker.errors import (
    Cancelled,
    InvalidRequest,
    SourceChanged,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    TooLarge,
    WorkerError,
)
from ssvm_worker.sources import open_source
from ssvm_worker.sources.exchange import HttpSettings
from ssvm_worker.sources.http import HttpSource, Validator, fetch_text
from ssvm_worker.stream import CHUNK, Resuming, Source
from tests.contracts.source import DATA, SourceContract, gather
from tests.neighbours import free_port
from tests.servers.http import Behaviour, HttpServer

LOOPBACK = HttpSettings(AddressRule(("127.0.0.0/8",)))
#: The origin's own words for a file that has not changed for a while.
OLD = "Mon, 02 Nov 2020 10:00:00 GMT"


def source(url: str, **more: object) -> HttpSource:
    """A source that may go to loopback."""
    return HttpSource(url, LOOPBACK, **more)  # type: ignore[arg-type]


def resuming(source: Source, offset: int = 0) -> Resuming:
    """The chunks of a source, resumed without waiting."""
    return Resuming(source, lambda _: None, offset=offset)


class TestHttpSource(SourceContract):
    @pytest.fixture
    def source(self, http_server: HttpServer) -> HttpSource:
        return source(http_server.serve("image", DATA))

    @pytest.fixture
    def missing(self, http_server: HttpServer) -> HttpSource:
        return source(http_server.url("nothing"))


class TestHttpsSource(TestHttpSource):
    @pytest.fixture
    def source(self, https_server: HttpServer, tmp_path: Path) -> HttpSource:
        return HttpSource(https_server.serve("image", DATA), trusting(https_server, tmp_path))

    @pytest.fixture
    def missing(self, https_server: HttpServer, tmp_path: Path) -> HttpSource:
        return HttpSource(https_server.url("nothing"), trusting(https_server, tmp_path))


def trusting(server: HttpServer, directory: Path) -> HttpSettings:
    """Settings that trust the server's authority."""
    return dataclasses.replace(LOOPBACK, ca_file=server.ca_file(directory))


# Whole bodies


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({"chunked": True}, id="chunked"),
        pytest.param({"content_length": "", "ranges": False}, id="no length, ends with the connection"),
        pytest.param({"ranges": False}, id="no ranges"),
        pytest.param({"etag": None}, id="no validator"),
        pytest.param({"rate": 50_000_000.0}, id="slow"),
        pytest.param({"headers": {"Content-Encoding": "gzip"}}, id="mislabelled as gzip: kept as sent"),
        pytest.param({"headers": {"Content-Type": "text/html"}}, id="another content type"),
    ],
)
def test_whole(http_server: HttpServer, behaviour: dict[str, object]) -> None:
    """However the body is framed, the bytes are those that were sent, and counted."""
    it = source(http_server.serve("image", DATA, **behaviour))
    assert (gather(it), it.size) == (DATA, len(DATA))


def test_tiny_chunks_are_joined(http_server: HttpServer) -> None:
    """Chunks of a chunked body do not become chunks of ours."""
    it = source(http_server.serve("image", DATA, chunked=True))
    assert len(list(it.open())) == len(DATA) // CHUNK + 1


def test_request_headers(http_server: HttpServer) -> None:
    """We ask for the bytes as they are, say who we are, and send what the caller gave."""
    gather(source(http_server.serve("image", DATA), headers={"X-Token": "t"}))
    sent = http_server.requests[0].headers
    assert sent["Accept-Encoding"] == "identity"
    assert sent["User-Agent"].startswith("ssvm-worker/")
    assert (sent["X-Token"], sent["Range"]) == ("t", None)


def test_proxy_variables(http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies of the environment are ignored: behind one, no address could be judged."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert gather(source(http_server.serve("image", DATA))) == DATA


# Bodies that are not whole, and answers without one


def test_empty(http_server: HttpServer) -> None:
    """An empty 200 is no object."""
    with pytest.raises(SourceNotFound, match="empty"):
        gather(source(http_server.serve("image", b"")))


SHORT = [
    pytest.param({"cut_after": 1000}, id="cut"),
    pytest.param({"cut_after": 0}, id="cut before the first byte"),
    pytest.param({"cut_after": 1000, "reset": True}, id="reset"),
    pytest.param({"cut_after": 1000, "chunked": True}, id="chunked, cut in a chunk"),
    pytest.param({"cut_after": len(DATA), "chunked": True}, id="chunked, last chunk missing"),
    pytest.param({"content_length": str(len(DATA) + 1)}, id="shorter than its Content-Length"),
    pytest.param({"headers": {"Content-Length": "7, 8"}}, id="two Content-Lengths"),
    pytest.param({"content_length": "-5"}, id="negative Content-Length"),
    pytest.param({"content_length": "lots"}, id="Content-Length is no number"),
]


@pytest.mark.parametrize("behaviour", SHORT)
def test_short(http_server: HttpServer, behaviour: dict[str, object]) -> None:
    """A body that breaks off, or whose length is unclear, is never taken for whole."""
    with pytest.raises(SourceUnavailable):
        gather(source(http_server.serve("image", DATA, **behaviour)))


def test_tls_without_a_good_bye(https_server: HttpServer, tmp_path: Path) -> None:
    """Over TLS, a body that ends with the connection is whole only if the end was signed."""
    url = https_server.serve("image", DATA, content_length="", cut_after=1000)
    with pytest.raises(SourceUnavailable):
        gather(HttpSource(url, trusting(https_server, tmp_path)))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, SourceNotFound),
        (410, SourceNotFound),
        (204, SourceNotFound),
        (401, SourceDenied),
        (403, SourceDenied),
        (400, SourceDenied),
        (304, SourceDenied),
        (206, SourceUnavailable),
        (202, SourceUnavailable),
        (408, SourceUnavailable),
        (429, SourceUnavailable),
        (500, SourceUnavailable),
        (503, SourceUnavailable),
    ],
)
def test_status(http_server: HttpServer, status: int, error: type[WorkerError]) -> None:
    """A status says whether another try makes sense, and stands in the text with the URL."""
    with pytest.raises(error) as caught:
        gather(source(http_server.serve("image", DATA, status=status)))
    assert "127.0.0.1" in caught.value.where
    assert str(status) in str(caught.value) or status == 204


@pytest.mark.parametrize(
    "behaviour", [pytest.param({"stall_after": 1000}, id="stall"), pytest.param({"drip": True}, id="drip")]
)
def test_stall(http_server: HttpServer, behaviour: dict[str, object]) -> None:
    """A server that goes quiet, or sends byte by byte, is given up."""
    settings = dataclasses.replace(LOOPBACK, stall_s=1.0)
    with pytest.raises(SourceUnavailable, match=r"bytes? moved"):
        gather(HttpSource(http_server.serve("image", DATA, **behaviour), settings))


def test_cancel_while_waiting(http_server: HttpServer) -> None:
    """A cancel reaches a read that waits for a silent server."""

    def check() -> None:
        if http_server.stalled.is_set():
            raise Cancelled("user")

    with pytest.raises(Cancelled):
        gather(source(http_server.serve("image", DATA, stall_after=1000), check=check))


def test_nobody_listens() -> None:
    """A refused connection may be tried again, and names the place."""
    with pytest.raises(SourceUnavailable, match="refused"):
        gather(source(f"http://127.0.0.1:{free_port()}/image"))


def test_unknown_host() -> None:
    """A name that does not resolve may do so later."""
    with pytest.raises(SourceUnavailable, match=r"image\.invalid"):
        gather(source("http://image.invalid/image"))


def test_not_http(https_server: HttpServer) -> None:
    """A server that does not speak HTTP is unavailable, not a crash."""
    with pytest.raises(SourceUnavailable):
        gather(source(https_server.url("image").replace("https", "http")))


# Where we go


def test_address_refused(http_server: HttpServer) -> None:
    """Loopback is refused unless listed; the error names the address, the rule and the setting."""
    with pytest.raises(SourceDenied, match=r"127\.0\.0\.1.*loopback.*download\.allow_networks"):
        gather(HttpSource(http_server.serve("image", DATA), HttpSettings()))
    assert not http_server.requests


def test_redirects(http_server: HttpServer) -> None:
    """Up to five redirects are followed."""
    http_server.serve("hop5", DATA)
    for hop in range(5):
        http_server.redirect(f"hop{hop}", f"/hop{hop + 1}")
    assert gather(source(http_server.url("hop0"))) == DATA


@pytest.mark.parametrize(
    ("location", "text"),
    [
        pytest.param("/image", "in a loop", id="to itself"),
        pytest.param("http://10.0.0.1/x", "private address", id="to a private address"),
        pytest.param("http://169.254.169.254/latest", "metadata", id="to cloud metadata"),
        pytest.param("file:///etc/passwd", "where we do not go", id="to a file"),
        pytest.param("ftp://127.0.0.1/x", "where we do not go", id="to ftp"),
        pytest.param("http://user:secret@127.0.0.1/x", "where we do not go", id="with a password"),
        pytest.param("http://:80/x", "where we do not go", id="to nowhere"),
    ],
)
def test_redirect_refused(http_server: HttpServer, location: str, text: str) -> None:
    """A redirect to where we would not go ourselves is refused."""
    with pytest.raises(SourceDenied, match=text) as caught:
        gather(source(http_server.redirect("image", location)))
    assert "secret" not in str(caught.value)


def test_too_many_redirects(http_server: HttpServer) -> None:
    """The sixth redirect is refused."""
    for hop in range(7):
        http_server.redirect(f"hop{hop}", f"/hop{hop + 1}")
    with pytest.raises(SourceDenied, match="More than 5 redirects"):
        gather(source(http_server.url("hop0")))
    assert len(http_server.requests) == 6


def test_redirect_from_https_to_http(https_server: HttpServer, http_server: HttpServer, tmp_path: Path) -> None:
    """A redirect never gives up TLS."""
    url = https_server.redirect("image", http_server.serve("image", DATA))
    with pytest.raises(SourceDenied, match="from https to http"):
        gather(HttpSource(url, trusting(https_server, tmp_path)))
    assert not http_server.requests


@pytest.fixture
def elsewhere() -> Iterator[HttpServer]:
    """A second origin."""
    server = HttpServer()
    yield server
    server.close()


def test_credentials_stay_with_their_origin(http_server: HttpServer, elsewhere: HttpServer) -> None:
    """The caller's headers go along on a redirect within the origin, and nowhere else; not even back."""
    http_server.serve("last", DATA)
    elsewhere.redirect("away", http_server.url("last"))
    http_server.redirect("here", elsewhere.url("away"))
    url = http_server.redirect("image", "/here")
    assert gather(source(url, headers={"Authorization": "Bearer s", "Cookie": "c"})) == DATA
    assert [each.headers["Authorization"] for each in http_server.requests] == ["Bearer s", "Bearer s", None]
    assert {name for each in elsewhere.requests for name in each.headers} & {"Authorization", "Cookie"} == set()


# TLS


def test_untrusted_certificate(https_server: HttpServer) -> None:
    """A certificate of an unknown authority is refused, with the way out."""
    with pytest.raises(SourceDenied, match=r"not trusted.*ca_file"):
        gather(source(https_server.serve("image", DATA)))


@pytest.mark.parametrize(
    ("certificate", "text"),
    [
        pytest.param({"certified_for": "other.example"}, "mismatch", id="of another host"),
        pytest.param({"expires": datetime(2020, 1, 2, tzinfo=UTC)}, "expired", id="expired"),
    ],
)
def test_bad_certificate(certificate: dict[str, object], text: str, tmp_path: Path) -> None:
    """A trusted authority does not excuse a wrong certificate."""
    server = HttpServer(tls=True, **certificate)  # type: ignore[arg-type]
    with pytest.raises(SourceDenied, match=text):
        gather(HttpSource(server.serve("image", DATA), trusting(server, tmp_path)))
    server.close()


# Resume


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({}, id="by a strong ETag"),
        pytest.param({"etag": None, "last_modified": OLD}, id="by an old Last-Modified"),
        pytest.param({"etag": 'W/"v1"', "last_modified": OLD}, id="by an old Last-Modified beside a weak ETag"),
    ],
)
def test_resume(http_server: HttpServer, behaviour: dict[str, object]) -> None:
    """A body that breaks off twice comes whole, by ranges that are conditional on the same object."""
    it = resuming(source(http_server.serve("image", DATA, cut_after=700_000, cut_times=2, **behaviour)))
    assert b"".join(it) == DATA
    assert [each.headers["Range"] for each in http_server.requests] == [None, "bytes=700000-", "bytes=1400000-"]
    assert {each.headers["If-Range"] for each in http_server.requests[1:]} == {behaviour.get("last_modified", '"v1"')}


def test_resume_after_resets(http_server: HttpServer) -> None:
    """A connection that is reset, with whatever came before lost or not, comes whole as well."""
    it = resuming(source(http_server.serve("image", DATA, cut_after=700_000, cut_times=2, reset=True)))
    assert b"".join(it) == DATA


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({"ranges": False}, id="no ranges"),
        pytest.param({"etag": None}, id="no validator"),
        pytest.param({"etag": 'W/"v1"'}, id="a weak ETag alone"),
        pytest.param({"etag": None, "last_modified": "Fri, 01 Jan 2100 00:00:00 GMT"}, id="changed just now"),
        pytest.param({"etag": None, "last_modified": "yesterday"}, id="a date that is none"),
        pytest.param({"chunked": True}, id="no length"),
    ],
)
def test_not_resumable(http_server: HttpServer, behaviour: dict[str, object]) -> None:
    """Without ranges, a length and a strong validator, no second open continues the first."""
    it = source(http_server.serve("image", DATA, **behaviour))
    gather(it)
    assert (it.resumable, it.validator) == (False, None)
    with pytest.raises(SourceChanged, match="nothing to tell"):
        gather(it, 1000)


OTHER = [
    pytest.param(Behaviour(DATA[::-1], etag='"v2"'), id="another ETag"),
    pytest.param(Behaviour(DATA, etag='"v2"', ignore_range=True), id="another ETag, ranges ignored"),
    pytest.param(Behaviour(DATA, etag=None), id="the ETag is gone"),
    pytest.param(Behaviour(DATA[:500]), id="shorter than the offset"),
    pytest.param(Behaviour(DATA + b"more"), id="longer, same ETag"),
    pytest.param(Behaviour(DATA, content_range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}"), id="range starts elsewhere"),
    pytest.param(Behaviour(DATA, content_range=f"bytes 1000-{len(DATA) - 1}/*"), id="range without a total"),
    pytest.param(Behaviour(DATA, content_range="pages 1-2/3"), id="range of something else"),
]


@pytest.mark.parametrize("then", OTHER)
def test_changed(http_server: HttpServer, then: Behaviour) -> None:
    """The rest of another object is never put behind the first bytes of this one."""
    it = source(http_server.serve("image", DATA, then=dataclasses.replace(then)))
    gather(it)
    with pytest.raises(SourceChanged):
        gather(it, 1000)


def test_range_answered_with_another_etag(http_server: HttpServer) -> None:
    """A server that honours the range but not the condition is found out by its ETag."""
    sly = Behaviour(DATA, last_modified='"v1"', etag='"v2"')
    it = source(http_server.serve("image", DATA, then=sly))
    gather(it)
    with pytest.raises(SourceChanged, match="ETag was"):
        gather(it, 1000)


def test_range_ignored(http_server: HttpServer) -> None:
    """A server that gives the whole of the same object is read from the start, and the first bytes are skipped."""
    it = source(http_server.serve("image", DATA, ignore_range=True))
    gather(it)
    assert gather(it, CHUNK + 1000) == DATA[CHUNK + 1000 :]


def test_second_attempt(http_server: HttpServer) -> None:
    """A later attempt goes on from the validator alone, also after its way through JSON."""
    url = http_server.serve("image", DATA)
    first = source(url)
    gather(first)
    assert first.validator
    validator = Validator(**dataclasses.asdict(first.validator))
    second = source(url, validator=validator)
    assert (second.resumable, second.size) == (True, len(DATA))
    assert gather(second, CHUNK) == DATA[CHUNK:]


def test_cut_for_good(http_server: HttpServer) -> None:
    """A server that never gives more than a few bytes is given up after the last try."""
    it = resuming(source(http_server.serve("image", DATA, cut_after=0)))
    with pytest.raises(SourceUnavailable):
        list(it)


# URLs and headers that are never sent


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("ftp://example.org/x", id="ftp"),
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("data:,x", id="data"),
        pytest.param("image.qcow2", id="no scheme"),
        pytest.param("", id="empty"),
        pytest.param("http:///x", id="no host"),
        pytest.param("http://exa mple.org/", id="blank in the host"),
        pytest.param("http://example.org:99999/", id="port out of range"),
        pytest.param("http://[::1/", id="bracket open"),
        pytest.param("http://example.org/\r\nX: y", id="line break"),
        pytest.param("http://good.example\\.evil.example/", id="backslash in the host"),
        pytest.param("http://" + "ä" * 100 + ".example/", id="host too long for IDNA"),
    ],
)
def test_bad_url(url: str) -> None:
    """A URL that cannot be fetched is an error of the request."""
    with pytest.raises(InvalidRequest):
        open_source(url, LOOPBACK)


def test_unknown_scheme() -> None:
    """The error of an unknown scheme lists those that are taken."""
    with pytest.raises(InvalidRequest, match="http, https"):
        open_source("gopher://example.org/", LOOPBACK)


def test_userinfo() -> None:
    """A password in the URL is refused and stands in no text."""
    with pytest.raises(InvalidRequest) as caught:
        open_source("https://joe:secret@example.org/x?token=secret", LOOPBACK)
    assert "secret" not in repr(caught.value)


def test_name_is_redacted() -> None:
    """The name of a source holds no value of its query."""
    it = open_source("https://s3.example:8443/b/k?X-Amz-Signature=secret&versionId=secret&secret", LOOPBACK)
    assert it.name == "https://s3.example:8443/b/k?X-Amz-Signature=***&versionId=***&***"


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"X Y": "a"}, {"": "a"}, {"Range": "bytes=0-"}, {"host": "x"}])
def test_bad_headers(headers: dict[str, str]) -> None:
    """A header that would smuggle in another, or is ours to set, is refused."""
    with pytest.raises(InvalidRequest):
        open_source("http://example.org/", LOOPBACK, headers=headers)


def test_awkward_path(http_server: HttpServer) -> None:
    """Blanks and letters beyond ASCII are quoted; what is quoted already stays."""
    with pytest.raises(SourceNotFound):
        gather(source(http_server.url("a b/ü%20%2F?q=ö r")))
    assert http_server.requests[0].path == "/a%20b/%C3%BC%20%2F?q=%C3%B6%20r"


def test_text(http_server: HttpServer) -> None:
    """A sums file is read as text."""
    assert fetch_text(http_server.serve("SHA256SUMS", b"ab  image\n"), LOOPBACK) == "ab  image\n"


def test_text_too_long(http_server: HttpServer) -> None:
    """A text is read to its limit and no further."""
    with pytest.raises(TooLarge):
        fetch_text(http_server.serve("SHA256SUMS", DATA), LOOPBACK)
