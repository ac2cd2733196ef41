"""Downloads over HTTP: complete or a clear error, and resumed only if the object is the same."""

from __future__ import annotations

import dataclasses
from http.client import HTTPResponse
from pathlib import Path

import pytest

from ssvm_worker.errors import (
    Cancelled,
    SourceChanged,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    TooLarge,
    WorkerError,
)
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources.http.source import HttpSource, Validator, fetch_text
from ssvm_worker.sources.options import HttpSettings
from ssvm_worker.streaming.interfaces import CHUNK, Source
from ssvm_worker.streaming.pipeline import Resuming
from tests.contracts.source import DATA, SourceContract, gather
from tests.neighbours import free_port
from tests.servers.http import PIECE, Behaviour, HttpServer

LOOPBACK = HttpSettings(AddressRule(("127.0.0.0/8",)))
#: The origin's headers for a file that has not changed for a while.
OLD = "Mon, 02 Nov 2020 10:00:00 GMT"


def source(url: str, **more: object) -> HttpSource:
    """Return a source that may use loopback."""
    return HttpSource(url, LOOPBACK, **more)  # type: ignore[arg-type]


def resuming(source: Source, offset: int = 0) -> Resuming:
    """Return the chunks of a source that resumes without waits."""
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
        return HttpSource(
            https_server.serve("image", DATA), dataclasses.replace(LOOPBACK, ca_file=https_server.ca_file(tmp_path))
        )

    @pytest.fixture
    def missing(self, https_server: HttpServer, tmp_path: Path) -> HttpSource:
        return HttpSource(
            https_server.url("nothing"), dataclasses.replace(LOOPBACK, ca_file=https_server.ca_file(tmp_path))
        )


# Complete bodies


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
    """For any framing of the body, the bytes are those that were sent, and their count is right."""
    it = source(http_server.serve("image", DATA, **behaviour))
    assert (gather(it), it.size) == (DATA, len(DATA))


def test_tiny_chunks_are_joined(http_server: HttpServer) -> None:
    """Tiny chunks of a chunked body are joined."""
    it = source(http_server.serve("image", DATA, chunked=True))
    assert len(list(it.open())) < len(DATA) // PIECE // 2


def test_request_headers(http_server: HttpServer) -> None:
    """The request asks for unencoded bytes, names the worker, and has the caller's headers."""
    gather(source(http_server.serve("image", DATA), headers={"X-Token": "t"}))
    sent = http_server.requests[0].headers
    assert sent["Accept-Encoding"] == "identity"
    assert sent["User-Agent"].startswith("ssvm-worker/")
    assert (sent["X-Token"], sent["Range"]) == ("t", None)


def test_proxy_variables(http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies of the environment are ignored, because they prevent the check of addresses."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert gather(source(http_server.serve("image", DATA))) == DATA


# Incomplete bodies, and answers without one


def test_empty(http_server: HttpServer) -> None:
    """An empty 200 is an error."""
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
    """A body that breaks off, or has an unclear length, is never accepted as complete."""
    with pytest.raises(SourceUnavailable):
        gather(source(http_server.serve("image", DATA, **behaviour)))


def test_tls_without_a_good_bye(https_server: HttpServer, tmp_path: Path) -> None:
    """Over TLS, a body that ends with the connection is complete only with a close_notify."""
    url = https_server.serve("image", DATA, content_length="", cut_after=1000)
    settings = dataclasses.replace(LOOPBACK, ca_file=https_server.ca_file(tmp_path))

    with pytest.raises(SourceUnavailable, match="EOF"):
        gather(HttpSource(url, settings))


def test_tls_with_a_good_bye(https_server: HttpServer, tmp_path: Path) -> None:
    """Over TLS, a body without a length is complete after a close_notify."""
    url = https_server.serve("image", DATA, content_length="", good_bye=True)
    settings = dataclasses.replace(LOOPBACK, ca_file=https_server.ca_file(tmp_path))

    assert gather(HttpSource(url, settings)) == DATA


def test_an_end_that_nobody_made(http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read without bytes on an open connection is not the end of the body."""
    monkeypatch.setattr(HTTPResponse, "read1", lambda *_: b"")
    url = http_server.serve("image", DATA, content_length="")

    with pytest.raises(SourceUnavailable, match="not the connection"):
        gather(source(url))


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
    """A status determines whether a retry may help, and is in the error with the URL."""
    with pytest.raises(error) as caught:
        gather(source(http_server.serve("image", DATA, status=status)))
    assert "127.0.0.1" in caught.value.where
    assert str(status) in str(caught.value) or status == 204


@pytest.mark.parametrize(
    "behaviour", [pytest.param({"stall_after": 1000}, id="stall"), pytest.param({"drip": True}, id="drip")]
)
def test_stall(http_server: HttpServer, behaviour: dict[str, object]) -> None:
    """A server that stalls, or sends byte by byte, is given up."""
    settings = dataclasses.replace(LOOPBACK, stall_s=1.0)
    with pytest.raises(SourceUnavailable, match=r"bytes? moved"):
        gather(HttpSource(http_server.serve("image", DATA, **behaviour), settings))


def test_cancel_while_waiting(http_server: HttpServer) -> None:
    """A cancel ends a read that waits for a silent server."""

    def check() -> None:
        if http_server.stalled.is_set():
            raise Cancelled("user")

    with pytest.raises(Cancelled):
        gather(source(http_server.serve("image", DATA, stall_after=1000), check=check))


def test_nobody_listens() -> None:
    """A refused connection is a temporary error that names the address."""
    with pytest.raises(SourceUnavailable, match="refused"):
        gather(source(f"http://127.0.0.1:{free_port()}/image"))


def test_unknown_host() -> None:
    """A name that does not resolve is a temporary error."""
    with pytest.raises(SourceUnavailable, match=r"image\.invalid"):
        gather(source("http://image.invalid/image"))


def test_not_http(https_server: HttpServer) -> None:
    """A server that does not speak HTTP is unavailable, not a crash."""
    with pytest.raises(SourceUnavailable):
        gather(source(https_server.url("image").replace("https", "http")))


# Resumption


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({}, id="by a strong ETag"),
        pytest.param({"etag": None, "last_modified": OLD}, id="by an old Last-Modified"),
        pytest.param({"etag": 'W/"v1"', "last_modified": OLD}, id="by an old Last-Modified beside a weak ETag"),
    ],
)
def test_resume(http_server: HttpServer, behaviour: dict[str, object]) -> None:
    """A body that breaks off twice is completed by ranges on the condition of the same object."""
    it = resuming(source(http_server.serve("image", DATA, cut_after=700_000, cut_times=2, **behaviour)))
    assert b"".join(it) == DATA
    assert [each.headers["Range"] for each in http_server.requests] == [None, "bytes=700000-", "bytes=1400000-"]
    assert {each.headers["If-Range"] for each in http_server.requests[1:]} == {behaviour.get("last_modified", '"v1"')}


def test_resume_after_resets(http_server: HttpServer) -> None:
    """After a reset the body is completed, whether earlier bytes were lost or not."""
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
    """Without ranges, a length and a strong validator, a second open starts at the first byte."""
    it = source(http_server.serve("image", DATA, **behaviour))
    gather(it)
    assert (it.resumable, it.validator) == (False, None)
    with pytest.raises(SourceChanged, match="nothing that identifies"):
        gather(it, 1000)


OTHER = [
    pytest.param(Behaviour(DATA[::-1], etag='"v2"'), id="another ETag"),
    pytest.param(Behaviour(DATA, etag='"v2"', ignore_range=True), id="another ETag, ranges ignored"),
    pytest.param(Behaviour(DATA, etag=None), id="the ETag is gone"),
    pytest.param(Behaviour(DATA[:500]), id="shorter than the offset"),
    pytest.param(Behaviour(DATA + b"more"), id="longer, same ETag"),
]
LAST = len(DATA) - 1
CODED = {"Content-Encoding": "gzip"}
UNUSABLE = [
    pytest.param(Behaviour(DATA, content_range=f"bytes 0-{LAST}/{len(DATA)}"), id="range starts elsewhere"),
    pytest.param(Behaviour(DATA, content_range=f"bytes 1000-1999/{len(DATA)}"), id="a shorter range"),
    pytest.param(Behaviour(DATA, content_range=f"bytes 1000-{LAST}/9999999"), id="another total"),
    pytest.param(Behaviour(DATA, content_range=f"bytes */{len(DATA)}"), id="no range"),
    pytest.param(Behaviour(DATA, content_range="pages 1-2/3"), id="range of something else"),
    pytest.param(Behaviour(DATA, content_range=f"bytes 1000-{'9' * 5000}/{len(DATA)}"), id="a number without end"),
    pytest.param(Behaviour(DATA, content_range="nonsense"), id="nonsense"),
]
REFUSED = [400, 403, 405, 412, 416, 500, 501, 502, 503]
CLEAR = [
    pytest.param(f"bytes 1000-{LAST}/*", id="without a total"),
    pytest.param(f"Bytes 1000-{LAST}/{len(DATA)}", id="another case"),
    pytest.param(f"bytes  1000 - {LAST} / {len(DATA)} ", id="blanks"),
    pytest.param(f"bytes=1000-{LAST}/{len(DATA)}", id="as in the request"),
]


@pytest.mark.parametrize("then", OTHER)
def test_changed(http_server: HttpServer, then: Behaviour) -> None:
    """The rest of another object is never appended to this one's first bytes."""
    it = source(http_server.serve("image", DATA, then=dataclasses.replace(then)))
    gather(it)
    with pytest.raises(SourceChanged):
        gather(it, 1000)


@pytest.mark.parametrize("then", UNUSABLE)
def test_unusable_range(http_server: HttpServer, then: Behaviour) -> None:
    """If the range is wrong, a plain GET reads the same object from its first byte."""
    it = source(http_server.serve("image", DATA, then=dataclasses.replace(then)))
    gather(it)
    assert gather(it, 1000) == DATA[1000:]
    assert [each.headers["Range"] for each in http_server.requests] == [None, "bytes=1000-", None]
    assert gather(it, 2000) == DATA[2000:]
    assert len(http_server.requests) == 4


@pytest.mark.parametrize("status", REFUSED)
def test_ranges_refused(http_server: HttpServer, status: int) -> None:
    """A server that refuses a range, and answers a plain GET, counts as one without ranges."""
    refusing = Behaviour(DATA, status=status, then=Behaviour(DATA))
    it = source(http_server.serve("image", DATA, then=refusing))
    gather(it)
    assert gather(it, 1000) == DATA[1000:]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(Behaviour(DATA, content_length="", cut_after=0), id="closed without a byte"),
        pytest.param(Behaviour(DATA, cut_after=0, reset=True), id="reset"),
    ],
)
def test_ranges_that_give_nothing(http_server: HttpServer, broken: Behaviour) -> None:
    """A server that breaks off only at ranges is finally read by plain GETs."""
    url = http_server.serve("image", DATA, cut_after=700_000, cut_times=1)
    http_server.paths["/image"].then = Behaviour(DATA, only_ranges=broken)
    assert b"".join(Resuming(source(url), lambda _: None, tries=3)) == DATA


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        pytest.param({"Retry-After": "7"}, [7.0], id="seconds"),
        pytest.param({"Retry-After": "Fri, 06 Nov 2099 10:00:09 GMT"}, [60.0], id="a date, longer than a job may wait"),
        pytest.param({"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}, [1.0], id="a date that has passed"),
        pytest.param({"Retry-After": "soon"}, [1.0], id="neither"),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after(http_server: HttpServer, headers: dict[str, str], waits: list[float], status: int) -> None:
    """A busy server is left alone for its Retry-After, up to a minute."""
    url = http_server.serve("image", DATA, status=status, headers=headers, then=Behaviour(DATA))
    waited: list[float] = []
    assert b"".join(Resuming(source(url), waited.append)) == DATA
    assert waited == waits


@pytest.mark.parametrize("content_range", CLEAR)
def test_forms_of_content_range(http_server: HttpServer, content_range: str) -> None:
    """Every clear form of Content-Range is accepted."""
    it = source(http_server.serve("image", DATA, then=Behaviour(DATA, content_range=content_range)))
    gather(it)
    assert gather(it, 1000) == DATA[1000:]
    assert len(http_server.requests) == 2


def test_range_in_another_coding(http_server: HttpServer) -> None:
    """A range with a new Content-Encoding is never appended."""
    it = source(http_server.serve("image", DATA, then=Behaviour(DATA, headers=CODED)))
    gather(it)
    with pytest.raises(SourceChanged, match="Content-Encoding"):
        gather(it, 1000)


def test_range_in_the_same_coding(http_server: HttpServer) -> None:
    """An object with a Content-Encoding in the first answer is resumed."""
    it = source(http_server.serve("image", DATA, headers=CODED))
    gather(it)
    assert gather(it, 1000) == DATA[1000:]


def test_range_without_the_etag(http_server: HttpServer) -> None:
    """A range without the ETag is not used, and a plain GET follows."""
    silent = Behaviour(DATA, etag=None, last_modified='"v1"', then=Behaviour(DATA))
    it = source(http_server.serve("image", DATA, then=silent))
    gather(it)
    assert gather(it, 1000) == DATA[1000:]


def test_ranges_refused_for_a_while(http_server: HttpServer) -> None:
    """A server that asks for fewer requests gets no second one at once."""
    it = source(http_server.serve("image", DATA, then=Behaviour(DATA, status=429)))
    gather(it)
    with pytest.raises(SourceUnavailable, match="429"):
        gather(it, 1000)
    assert len(http_server.requests) == 2


def test_whole_range_that_nobody_asked_for(http_server: HttpServer) -> None:
    """A 206 to a plain GET is accepted if it has the whole object."""
    headers = {"Content-Range": f"bytes 0-{LAST}/{len(DATA)}"}
    assert gather(source(http_server.serve("image", DATA, status=206, headers=headers))) == DATA


def test_range_that_nobody_asked_for(http_server: HttpServer) -> None:
    """A part of the object is never accepted as the whole."""
    headers = {"Content-Range": f"bytes 0-{LAST}/{len(DATA) + 1}"}
    with pytest.raises(SourceUnavailable, match="206"):
        gather(source(http_server.serve("image", DATA, status=206, headers=headers)))


def test_resume_at_the_mirror_of_the_first_bytes(http_server: HttpServer) -> None:
    """The rest is requested from the mirror of the first bytes, not from the redirector."""
    http_server.serve("one", DATA, cut_after=700_000, cut_times=1, etag='"one"')
    http_server.serve("two", DATA, etag='"two"')
    url = http_server.redirect("image", "/one")
    http_server.paths["/image"].then = Behaviour(status=302, headers={"Location": "/two"})
    assert b"".join(resuming(source(url))) == DATA
    assert [each.path for each in http_server.requests] == ["/image", "/one", "/one"]


def test_mirror_of_the_first_bytes_is_gone(http_server: HttpServer) -> None:
    """If the first mirror is gone, the redirector is asked again, and the other copy is recognised."""
    http_server.serve("one", DATA, cut_after=700_000, etag='"one"', then=Behaviour(status=404))
    http_server.serve("two", DATA, etag='"two"')
    url = http_server.redirect("image", "/one")
    http_server.paths["/image"].then = Behaviour(status=302, headers={"Location": "/two"})
    it = source(url)
    with pytest.raises(SourceUnavailable):
        gather(it)
    with pytest.raises(SourceChanged, match='"two"'):
        gather(it, 700_000)
    assert gather(it) == DATA


def test_range_answered_with_another_etag(http_server: HttpServer) -> None:
    """A server that ignores the range's condition is recognised by its ETag."""
    sly = Behaviour(DATA, last_modified='"v1"', etag='"v2"')
    it = source(http_server.serve("image", DATA, then=sly))
    gather(it)
    with pytest.raises(SourceChanged, match="ETag was"):
        gather(it, 1000)


def test_range_ignored(http_server: HttpServer) -> None:
    """If a server ignores the range, the object is read from its start, and known bytes are skipped."""
    it = source(http_server.serve("image", DATA, ignore_range=True))
    gather(it)
    assert gather(it, CHUNK + 1000) == DATA[CHUNK + 1000 :]


def test_second_attempt(http_server: HttpServer) -> None:
    """A later attempt resumes with the validator alone, also after its conversion to JSON."""
    url = http_server.serve("image", DATA)
    first = source(url)
    gather(first)
    assert first.validator
    validator = Validator(**dataclasses.asdict(first.validator))
    second = source(url, validator=validator)
    assert (second.resumable, second.size) == (True, len(DATA))
    assert gather(second, CHUNK) == DATA[CHUNK:]


def test_cut_for_good(http_server: HttpServer) -> None:
    """A server that sends only a few bytes per try is given up after the last one."""
    it = resuming(source(http_server.serve("image", DATA, cut_after=0)))
    with pytest.raises(SourceUnavailable):
        list(it)


def test_text(http_server: HttpServer) -> None:
    """A checksum file is read as text."""
    assert fetch_text(http_server.serve("SHA256SUMS", b"ab  image\n"), LOOPBACK) == "ab  image\n"


def test_text_too_long(http_server: HttpServer) -> None:
    """A text is read up to its limit."""
    with pytest.raises(TooLarge):
        fetch_text(http_server.serve("SHA256SUMS", DATA), LOOPBACK)
