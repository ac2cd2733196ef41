"""Unusual answers that RFC 9110 and 9112 allow give the bytes; answers of hostile servers give a clear error."""

from __future__ import annotations

import dataclasses
import re
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.errors import Cancelled, SourceDenied, SourceNotFound, SourceUnavailable, StoreUnavailable
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.http import HttpOptions
from ssvm_worker.net.proxy import parse_proxy
from ssvm_worker.sources import find_source
from ssvm_worker.sources.http.source import HttpSource
from ssvm_worker.sources.options import HttpSettings, SourceOptions
from ssvm_worker.stores.http_put import PutSink
from ssvm_worker.streaming.pipeline import Resuming
from tests.contracts.source import DATA, gather
from tests.servers.http import HttpServer
from tests.servers.raw import Serve

RULE = AddressRule(("127.0.0.0/8",))
LOOPBACK = HttpSettings(RULE)
#: Short, for servers that send without end.
HASTY = HttpSettings(RULE, stall_s=1.0)
GOING, PROCESSING, HINTS = (
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nLink: </b>\r\n\r\n",
)
INTERIM = [
    pytest.param(GOING, id="100"),
    pytest.param(PROCESSING, id="102"),
    pytest.param(HINTS, id="103"),
    pytest.param(b"HTTP/1.1 199 Who Knows\r\n\r\n", id="199"),
    pytest.param(b"HTTP/1.1 100\r\n\r\n", id="no reason"),
    pytest.param(GOING + HINTS + PROCESSING + HINTS * 4, id="several"),
]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def plain(body: bytes = DATA, fields: bytes = b"", status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return status + b"\r\nContent-Length: %d\r\n" % len(body) + fields + b"\r\n" + body


def chunked(body: bytes, trailers: bytes = b"", extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n0\r\n%s\r\n" % (len(body), extension, body, trailers)


def said(raw_server: Serve, answer: bytes, settings: HttpSettings = LOOPBACK) -> bytes:
    """Return what a source reads from a server that sends exactly those bytes."""
    return gather(HttpSource(raw_server(lambda connection, _: connection.sendall(answer)).url, settings))


def test_slow_chunks(raw_server: Serve) -> None:
    """A source gives what a slow server has sent, and does not wait until a large chunk is complete."""
    received = threading.Event()

    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(CHUNKED)
        while not received.wait(0.05):
            connection.sendall(b"1\r\nx\r\n")
        connection.sendall(b"0\r\n\r\n")

    with closing(HttpSource(raw_server(answer).url, LOOPBACK).open()) as chunks:
        first = next(chunks)
        received.set()
        assert set(first) == set(b"x")
        assert set(b"".join(chunks)) <= set(b"x")


# Interim answers


@pytest.mark.parametrize("interim", INTERIM)
def test_interim_answers(raw_server: Serve, interim: bytes) -> None:
    """The client skips 1xx answers (RFC 9110, 15.2)."""
    assert said(raw_server, interim + plain()) == DATA


def test_interim_answers_over_tls(raw_server: Serve, tmp_path: Path) -> None:
    """The client skips 1xx answers over TLS."""
    server = raw_server(lambda connection, _: connection.sendall(HINTS + GOING + plain()), tls=True)
    trusting = dataclasses.replace(LOOPBACK, ca_file=server.ca_file(tmp_path))
    assert gather(HttpSource(server.url, trusting)) == DATA


def test_interim_answers_to_a_range(raw_server: Serve) -> None:
    """The client skips 1xx answers before a 206."""

    def answer(connection: socket.socket, came: bytes) -> None:
        fields = b'ETag: "v1"\r\nAccept-Ranges: bytes\r\n'
        if asked := re.search(rb"Range: bytes=(\d+)-", came):
            start = int(asked[1])
            fields += b"Content-Range: bytes %d-%d/%d\r\n" % (start, len(DATA) - 1, len(DATA))
            connection.sendall(HINTS + plain(DATA[start:], fields, b"HTTP/1.1 206 Partial Content"))
        else:
            connection.sendall(HINTS + plain(DATA, fields)[:-1_000_000])

    server = raw_server(answer)
    assert b"".join(Resuming(HttpSource(server.url, LOOPBACK), lambda _: None)) == DATA
    assert len(server.heads) == 2


def test_interim_answers_of_a_proxy(raw_server: Serve, https_server: HttpServer, tmp_path: Path) -> None:
    """The client skips 1xx answers of a proxy before a tunnel."""

    def answer(connection: socket.socket, came: bytes) -> None:
        connection.sendall(PROCESSING + GOING + b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", https_server.port)) as there:
            back = threading.Thread(target=pump, args=(there, connection), daemon=True)
            back.start()
            pump(connection, there)
            back.join()

    proxy = parse_proxy(f"http://127.0.0.1:{raw_server(answer).port}")
    settings = HttpSettings(RULE, proxy=proxy, ca_file=https_server.ca_file(tmp_path))
    assert gather(HttpSource(https_server.serve("image", DATA), settings)) == DATA


def pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("interim", [pytest.param(GOING * 1000, id="100"), pytest.param(HINTS * 1000, id="103")])
def test_too_many_interim_answers(raw_server: Serve, interim: bytes) -> None:
    """A server that sends only interim answers is an error of the source."""
    with pytest.raises(SourceUnavailable, match="interim"):
        said(raw_server, interim + plain())


def test_switching_protocols(raw_server: Serve) -> None:
    """Status 101 is an error, because the client cannot continue after it."""
    with pytest.raises(SourceUnavailable, match="protocol"):
        said(raw_server, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n" + plain())


# Forms of an answer

FORMS = [
    pytest.param(plain(fields=b"Content-Length: %d\r\n" % len(DATA)), id="Content-Length twice"),
    pytest.param(plain(status=b"HTTP/1.0 200 OK"), id="HTTP/1.0"),
    pytest.param(b"HTTP/1.0 200 OK\r\n\r\n" + DATA, id="HTTP/1.0, no length"),
    pytest.param(b"HTTP/1.1 200\r\nContent-Length:%d\r\n\r\n" % len(DATA) + DATA, id="no reason, no blank"),
    pytest.param(b"HTTP/1.1 200 OK\nContent-Length: %d\n\n" % len(DATA) + DATA, id="bare line feeds"),
    pytest.param(b"HTTP/1.1 200 OK\r\ncontent-LENGTH : %d  \r\n\r\n" % len(DATA) + DATA, id="blank before the colon"),
    pytest.param(
        plain(fields=b"no field at all\r\nX: folded\r\n  value\r\n"), id="a line that is no field, a folded one"
    ),
    pytest.param(plain(fields=b"X: \xff\xfe\x01\r\nTransfer-Encoding: identity\r\n"), id="odd bytes, identity"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked \r\n\r\n" + chunked(DATA), id="chunked in another case"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(DATA), id="both lengths"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(DATA, b"X: y\r\n" * 9, b' ; a="b"'),
        id="chunk extensions and trailers",
    ),
]


@pytest.mark.parametrize("answer", FORMS)
def test_forms(raw_server: Serve, answer: bytes) -> None:
    """Every allowed form of an answer gives the same body."""
    assert said(raw_server, answer) == DATA


def test_equal_lengths_in_a_list(raw_server: Serve) -> None:
    """A list of equal numbers is a valid Content-Length, also if the connection stays open."""

    def answer(connection: socket.socket, came: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d, %d\r\n\r\n" % (len(DATA), len(DATA)) + DATA)
        server.closing.wait()

    server = raw_server(answer)
    assert gather(HttpSource(server.url, LOOPBACK)) == DATA


@pytest.mark.parametrize("status", [b"204 No Content", b"205 Reset Content"])
def test_no_content(raw_server: Serve, status: bytes) -> None:
    """An answer without a body is an empty file."""
    with pytest.raises(SourceNotFound, match="empty"):
        said(raw_server, b"HTTP/1.1 " + status + b"\r\n\r\n")


@pytest.mark.parametrize(
    "modified", [b"Monday, 02-Nov-20 10:00:00 GMT", b"Mon Nov  2 10:00:00 2020", b"Mon, 02 Nov 2020 10:00:00 GMT"]
)
def test_forms_of_dates(raw_server: Serve, modified: bytes) -> None:
    """Each of the three forms of Last-Modified identifies a version (RFC 9110, 5.6.7)."""
    fields = b"Accept-Ranges: bytes\r\nDate: Tue, 03 Nov 2020 10:00:00 GMT\r\nLast-Modified: " + modified + b"\r\n"
    it = HttpSource(raw_server(lambda connection, _: connection.sendall(plain(fields=fields))).url, LOOPBACK)
    gather(it)
    assert it.resumable


@pytest.mark.parametrize("etag", [b'"v1', b"v1", b'"a"b"', b'W/"v1"', b'"a\x01b\x00"x'])
def test_no_etag(raw_server: Serve, etag: bytes) -> None:
    """A weak or malformed ETag identifies no version."""
    fields = b"Accept-Ranges: bytes\r\nETag: " + etag + b"\r\n"
    it = HttpSource(raw_server(lambda connection, _: connection.sendall(plain(fields=fields))).url, LOOPBACK)
    assert gather(it) == DATA
    assert not it.resumable


# Redirects


@pytest.mark.parametrize(
    ("location", "path"),
    [
        pytest.param("/Prüfstand/ä.img?ö=ü".encode(), b"/Pr%C3%BCfstand/%C3%A4.img?%C3%B6=%C3%BC", id="UTF-8"),
        pytest.param(b"/Pr%C3%BCfstand.img", b"/Pr%C3%BCfstand.img", id="quoted by the server"),
        pytest.param("/Prüfstand.img".encode("latin-1"), b"/Pr%FCfstand.img", id="Latin-1"),
        pytest.param("/試験.img".encode("shift-jis"), b"/%8E%8E%8C%B1.img", id="Shift JIS"),
        pytest.param(b"a b.img#part", b"/a%20b.img", id="relative, blank, fragment"),
    ],
)
def test_location(raw_server: Serve, location: bytes, path: bytes) -> None:
    """The client sends the bytes of a Location back to the server, quoted once."""

    def answer(connection: socket.socket, came: bytes) -> None:
        if came.startswith(b"GET /image "):
            connection.sendall(plain(b"", b"Location: " + location + b"\r\n", b"HTTP/1.1 302 Found"))
        else:
            connection.sendall(plain())

    server = raw_server(answer)
    assert gather(HttpSource(server.url, LOOPBACK)) == DATA
    assert server.heads[1].split(b" ")[1] == path


def test_location_with_a_host_in_utf8(raw_server: Serve) -> None:
    """A host in UTF-8 is looked up in its ASCII form (RFC 3490)."""
    fields = "Location: http://prüfstand.invalid/a\r\n".encode()
    with pytest.raises(SourceUnavailable) as caught:
        said(raw_server, plain(b"", fields, b"HTTP/1.1 302 Found"))
    assert "xn--prfstand-75a.invalid" in caught.value.where


# Hostile answers

REDIRECTS = [
    pytest.param(b"http://a..b/", id="empty label"),
    pytest.param(b"http://" + b"a" * 64 + b".example/", id="label of 64 letters"),
    pytest.param(b"http://.example/", id="empty first label"),
    pytest.param(b"http://[::1/", id="bracket open"),
    pytest.param(b"http://example.org:port/", id="port that is no number"),
    pytest.param(b"http://\xed\xa0\x80.example/", id="surrogate"),
    pytest.param(b"http://" + "ä".encode() * 100 + b".example/", id="label too long for IDNA"),
    pytest.param(b"http://\xff.example/", id="host in no encoding"),
]
ANSWERS = [
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n" + DATA, id="length of 5000 digits"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello", id="length with a sign"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5_0\r\n\r\nhello", id="length with a line"),
    pytest.param(plain(fields=b"Content-Length: 7\r\n"), id="two lengths"),
    pytest.param(plain(fields=b"Transfer-Encoding: gzip, chunked\r\n"), id="a coding that nobody asked for"),
    *(
        pytest.param(CHUNKED + size + b"\r\nhello\r\n0\r\n\r\n", id=name)
        for size, name in (
            (b"-3", "chunk of -3"),
            (b"-1", "chunk of -1"),
            (b"0x5", "chunk of 0x5"),
            (b"f" * 5000, "chunk of 5000 digits"),
            (b"5;" + b"x" * 100_000, "endless chunk extension"),
            (b"", "chunk without a size"),
            (b"\xc2\xb2", "chunk of an odd digit"),
        )
    ),
    pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n" + DATA, id="a thousand fields"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n" + DATA, id="field of a megabyte"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", id="ends in the head"),
    pytest.param(b"HTTP/1.1 99999999999999999999 OK\r\n\r\n", id="status without end"),
    pytest.param(b"HTTP/2.0 200 OK\r\n\r\n", id="another version"),
    pytest.param(b"ICY 200 OK\r\n\r\n" + DATA, id="not HTTP"),
    pytest.param(b"\x00" * 1000, id="zeroes"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(DATA, b"X: y\r\n" * 100_000), id="trailers"
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"x" * 1000 + b"\r\nh\r\n") * 100,
        id="more extensions than data",
    ),
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_hostile_answer(raw_server: Serve, http_server: HttpServer, answer: bytes) -> None:
    """An unreadable answer is an error of that server, and the next mirror is tried."""
    server = raw_server(lambda connection, _: connection.sendall(answer))
    with pytest.raises(SourceUnavailable):
        gather(HttpSource(server.url, HASTY))
    urls, checksum = [server.url, http_server.serve("image", DATA)], digest_of(DATA)
    source = find_source(urls, SourceOptions(HASTY), checksum)
    assert b"".join(Resuming(source, lambda _: None)) == DATA


@pytest.mark.parametrize("location", REDIRECTS)
def test_hostile_redirect(raw_server: Serve, http_server: HttpServer, location: bytes) -> None:
    """A redirect to an invalid URL is refused, and the next mirror is tried."""
    answer = plain(b"", b"Location: " + location + b"\r\n", b"HTTP/1.1 302 Found")
    server = raw_server(lambda connection, _: connection.sendall(answer))
    with pytest.raises(SourceDenied):
        gather(HttpSource(server.url, LOOPBACK))
    source = find_source([server.url, http_server.serve("image", DATA)], SourceOptions(LOOPBACK), None)
    assert gather(source) == DATA


def forever(connection: socket.socket, head: bytes, piece: bytes, closing: threading.Event, pause: float) -> None:
    """Send the head, and then repeat the piece."""
    connection.sendall(head)
    while not closing.wait(pause):
        connection.sendall(piece)


ENDLESS = {
    "100 Continue": (b"", GOING),
    "fields": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "a field": (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 10),
    "a status line": (b"HTTP/1.1 200 ", b"OK"),
    "trailers": (CHUNKED + b"5\r\nhello\r\n0\r\n", b"X: y\r\n"),
    "a chunk size": (CHUNKED, b"0" * 10),
}


@pytest.mark.parametrize("pause", [0.0, 0.05], ids=["fast", "slowly"])
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_answer(raw_server: Serve, name: str, pause: float) -> None:
    """A head or a trailer without end is aborted, also while bytes arrive."""
    head, piece = ENDLESS[name]
    server = raw_server(lambda connection, _: forever(connection, head, piece, server.closing, pause))
    with pytest.raises(SourceUnavailable):
        gather(HttpSource(server.url, HASTY))


@pytest.mark.parametrize("name", ENDLESS)
def test_cancel_while_bytes_move(raw_server: Serve, name: str) -> None:
    """A cancel takes effect while bytes arrive without end."""
    head, piece = ENDLESS[name]
    begun = threading.Event()

    def answer(connection: socket.socket, came: bytes) -> None:
        begun.set()
        forever(connection, head, piece, server.closing, 0.05)

    def check() -> None:
        if begun.is_set():
            raise Cancelled("user")

    server = raw_server(answer)
    with pytest.raises(Cancelled):
        gather(HttpSource(server.url, HttpSettings(RULE, stall_s=3600.0, min_rate=0.001), check=check))


# Uploads


def taking(first: bytes, last: bytes, status: bytes = b"201 Created") -> object:
    """Answer a PUT: send *first* after its head, and *last* after its body."""

    def answer(connection: socket.socket, came: bytes) -> None:
        head, _, body = came.partition(b"\r\n\r\n")
        size = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
        connection.sendall(first)
        have = len(body)
        while have < size and (piece := connection.recv(65536)):
            have += len(piece)
        if have == size:
            connection.sendall(last + b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

    return answer


def put(url: str, ca_file: str | None = None, stall_s: float = 60.0) -> None:
    with PutSink(url, len(DATA), HttpOptions(RULE, ca_file=ca_file, stall_s=stall_s)) as sink:
        for start in range(0, len(DATA), 65536):
            sink.write(DATA[start : start + 65536])
        sink.commit()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("where", ["before the body", "after the body", "both"])
@pytest.mark.parametrize("interim", INTERIM)
def test_interim_answers_to_a_put(raw_server: Serve, tmp_path: Path, interim: bytes, where: str, tls: bool) -> None:
    """Interim answers before and after the body of a PUT are skipped."""
    first, last = interim * (where != "after the body"), interim * (where != "before the body")
    server = raw_server(taking(first, last), tls=tls)
    put(server.url, server.ca_file(tmp_path) if tls else None)


def test_interim_answer_in_pieces(raw_server: Serve) -> None:
    """An interim answer whose end arrives after the body is skipped too."""
    put(raw_server(taking(b"HTTP/1.1 10", b"2 Processing\r\n\r\n")).url)
    put(raw_server(taking(b"HTTP/1.1 100 Continue\r\nX:", b" y\r\n\r\n")).url)


@pytest.mark.parametrize("first", [GOING * 1000, b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], ids=["endless", "101"])
def test_interim_answers_that_end_a_put(raw_server: Serve, first: bytes) -> None:
    """Too many interim answers, or a 101, abort a PUT."""
    with pytest.raises(StoreUnavailable):
        put(raw_server(taking(first, b"")).url)


def test_endless_answer_to_a_put(raw_server: Serve) -> None:
    """A PUT is aborted if its answer has no end."""

    def answer(connection: socket.socket, came: bytes) -> None:
        forever(connection, b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 100, server.closing, 0.05)

    server = raw_server(answer)
    with pytest.raises(StoreUnavailable):
        put(server.url, stall_s=1.0)
