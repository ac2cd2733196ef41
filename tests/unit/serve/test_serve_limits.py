"""A client's input to `ssvm serve` is limited in size, number and time, and no request ends in a 500."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.ledger.links import GET, Link, new_id
from ssvm_worker.net.listener import Listener, RateLimit
from ssvm_worker.wiring import assembly
from tests.servers.service import Service
from tests.servers.worker import until
from tests.unit.serve.test_serve import KEY, put_image
from tests.uploads import IMAGE, PATCH, TUS, begin_put, upload_link, url_of
from tests.waiting import PATIENCE_S

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def connect(service: Service) -> socket.socket:
    """Return a connection whose reads wait for at most a minute."""
    return socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), 60)


def rest(peer: socket.socket) -> bytes:
    """Return the service's output until it closes the connection."""
    found = b""
    try:
        while piece := peer.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def status(answer: bytes) -> int:
    """Return the status of an answer, or 0 for none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.parametrize(
    ("begin", "piece", "refusal"),
    [
        (HEALTH, b"X: " + b"a" * 8000 + b"\r\n", 431),
        (HEALTH, b"X: 1\r\n", 431),
        (HEALTH + b"X: ", b"a" * 8000, 431),
        (HEALTH, b"a" * 8000, 431),
        (b"GET /", b"a" * 8000, 414),
        (b"GET /health?", b"a=b&" * 2000, 414),
    ],
    ids=["large headers", "many headers", "a header's value", "a header's name", "a path", "a query"],
)
def test_endless_head(service: Service, begin: bytes, piece: bytes, refusal: int) -> None:
    """A head without end is refused and the connection is closed after little input."""
    with connect(service) as peer:
        peer.sendall(begin)
        sent = 0
        peer.setblocking(False)
        answer = b""
        while not answer and sent < 64 << 20:
            try:
                sent += peer.send(piece)
                answer = peer.recv(1 << 16)
            except BlockingIOError:
                time.sleep(0.001)  # the kernel's buffers are full
            except OSError:
                break
        peer.settimeout(PATIENCE_S)
        assert status(answer or rest(peer)) == refusal
        assert sent < 32 << 20  # both kernels' buffers, and the bytes that are discarded after the answer
        rest(peer)


@pytest.mark.parametrize(
    ("data", "is_refused"),
    [
        (CHUNKED + b"4;" + b"x" * (140 << 10) + b"\r\n", True),
        (CHUNKED + b"0\r\n" + b"X: a\r\n" * (24 << 10), True),
        (CHUNKED + b"0\r\nX: " + b"a" * (140 << 10), True),
        (CHUNKED + b"4;name=value\r\nabcd\r\n0\r\nX-Sum: 1\r\n\r\n", False),
    ],
    ids=["chunk extension", "trailers", "a trailer", "a short one"],
)
def test_aside_of_a_body(service: Service, link: Link, data: bytes, is_refused: bool) -> None:
    """The metadata of a chunked body has the limit of a head."""
    request = data.replace(b"POST /health", f"PUT {url_of(service, link)}".encode())
    with connect(service) as peer:
        peer.sendall(request)
        answer = rest(peer) if is_refused else peer.recv(1 << 16)
    assert (b"HTTP/1.1 431" in answer) == is_refused
    assert (b"HTTP/1.1 422" in answer) != is_refused


@pytest.fixture
def link(service: Service) -> Link:
    """Return an upload link."""
    return upload_link(service)


def test_large_head_within_the_limit(service: Service) -> None:
    """Large headers, such as a proxy's cookies, pass up to 48 KiB."""
    with connect(service) as peer:
        peer.sendall(HEALTH + b"Cookie: " + b"a" * (48 << 10) + b"\r\nConnection: close\r\n\r\n")
        assert status(rest(peer)) == 200


def test_head_in_bytes(service: Service) -> None:
    """A head that arrives byte by byte is accepted."""
    with connect(service) as peer:
        for byte in HEALTH + b"Connection: close\r\n\r\n":
            peer.sendall(bytes([byte]))
        assert status(rest(peer)) == 200


def test_pipeline(service: Service) -> None:
    """A client cannot queue unlimited requests before it reads an answer."""
    with connect(service) as peer:
        peer.sendall((HEALTH + b"\r\n") * 1000)
        assert rest(peer).count(b"HTTP/1.1 200") < 100


def closed(peer: socket.socket) -> bool:
    """Return whether the service has closed the connection."""
    peer.setblocking(False)
    try:
        return not peer.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("limits", [{"max_connections": 4}, {"max_per_address": 4}])
@pytest.mark.parametrize("said", [b"", b"GET /hea", HEALTH + b"\r\n"], ids=["silent", "in a head", "answered"])
def test_idle_connections_make_room(start_service: Callable[..., Service], limits: dict[str, int], said: bytes) -> None:
    """Many connections without a signed request do not block a new client."""
    service = start_service(**limits)
    peers = [connect(service) for _ in range(12)]
    for peer in peers:
        if said:
            try:
                peer.sendall(said)
            except OSError:  # it was already due to close
                assert closed(peer)
    for _ in range(3):
        assert service.request("GET", "/health", headers={"Connection": "close"}).status == 200
    until(lambda: sum(closed(peer) for peer in peers) >= 9, "the oldest are closed")
    for peer in peers:
        peer.close()


def test_transfers_are_kept(start_service: Callable[..., Service]) -> None:
    """A new connection never ends a transfer of a link, and gets 503 if there are only those."""
    service = start_service(max_connections=2)
    data = bytes(64 << 20)
    put_image(service, data, str(digest_of(data)))
    at = link_to_object(service)
    with connect(service) as download, begin_put(service, url_of(service, upload_link(service)), b"x" * 600) as upload:
        download.sendall(f"GET {at} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = len(download.recv(1))
        until(lambda: _answer(service) == 503, "both transfers have begun")
        while got := len(download.recv(1 << 20)):
            received += got
        assert received > len(data)
        upload.sendall(b"x")
        until(lambda: _answer(service) == 200, "the download has made room")


def link_to_object(service: Service) -> str:
    """Return a link to the object that ``put_image`` made."""
    made = Link(new_id(), GET, int(time.time()) + 3600, "primary", KEY)
    assembly.open_links(service.settings).add(made)
    return assembly.link_signer(service.settings).sign(made.path, made.until)


def _answer(service: Service) -> int:
    with connect(service) as peer:
        with contextlib.suppress(OSError):
            peer.sendall(HEALTH + b"Connection: close\r\n\r\n")
        return status(rest(peer))


def test_trusted_proxy(start_service: Callable[..., Service]) -> None:
    """No limit per address applies to a trusted proxy, because its connections belong to many clients."""
    service = start_service(max_per_address=2, trusted_proxies=["127.0.0.0/8"])
    peers = [connect(service) for _ in range(8)]
    for peer in peers:
        peer.sendall(HEALTH + b"Connection: close\r\n\r\n")
        assert status(rest(peer)) == 200
        peer.close()


def test_silent_before_tls(start_service: Callable[..., Service], tmp_path: Path) -> None:
    """A connection that never starts its TLS handshake counts like any other."""
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    service = start_service(
        max_connections=4, certificate_file=tmp_path / "both.pem", private_key_file=tmp_path / "both.pem"
    )
    peers = [connect(service) for _ in range(12)]
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    with context.wrap_socket(connect(service), server_hostname="127.0.0.1") as peer:
        peer.sendall(HEALTH + b"Connection: close\r\n\r\n")
        assert status(rest(peer)) == 200
    until(lambda: sum(closed(peer) for peer in peers) >= 9, "the oldest are closed")
    for silent in peers:
        silent.close()


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", ["/health", "/nowhere", "/put/x", "/get/x/primary/y"])
def test_body_after_the_answer(service: Service, method: str, path: str) -> None:
    """A client that is answered before the end of its body is disconnected in time."""
    with connect(service) as peer:
        peer.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n".encode())
        answer = rest(peer)
    assert 200 <= status(answer) < 500
    assert b"connection: close" in answer.lower()


def test_accepted_in_one_go(broker_free_listener: Listener) -> None:
    """Without a free handle the listener closes an old connection and does not fail."""
    address = broker_free_listener.getsockname()
    peers = [socket.create_connection(address) for _ in range(6)]
    accepted = [broker_free_listener.accept()[0] for _ in peers]
    open_ones = [each for each in accepted if not _hung_up(each)]
    assert open_ones == accepted[-3:]
    for each in [*peers, *accepted]:
        each.close()


@pytest.fixture
def broker_free_listener() -> Iterator[Listener]:
    """Return a listener that allows three connections."""
    with Listener(socket.create_server(("127.0.0.1", 0)), max_connections=3, max_per_address=10) as listener:
        yield listener


def _hung_up(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_log_lines_have_a_rate() -> None:
    """A log line that clients can cause is logged a few times, and then counted."""
    limit, now = RateLimit(max_lines=3, every_s=3600), itertools.repeat("Invalid HTTP request received.")
    records = [logging.makeLogRecord({"msg": text}) for text in itertools.islice(now, 100)]
    assert sum(map(limit.filter, records)) == 3
    assert limit.filter(logging.makeLogRecord({"msg": "something else"}))


def test_left_out_lines_are_counted() -> None:
    """The next logged line has the number of omitted lines."""
    limit = RateLimit(max_lines=1, every_s=0)
    limit._seen["text"] = (0.0, 8)
    record = logging.makeLogRecord({"msg": "text"})
    assert limit.filter(record)
    assert record.msg == "text (7 more such lines were left out)"


# No request may end in a 500: random combinations of odd parts to every path, with and without a link.

ODD = ["", "[", "[::1", "\u20ac", "%E2%82%AC", "%00", "%0d%0aSet-Cookie: a=b", "9" * 5000, "-1", "1e3", "\u0661"]
ODD += ["a\x80b", "%ff", "%ud800", "//", "..", "*", "x" * 300, "bytes=0-1,5-", "bytes=-", "bytes=" + "9" * 400 + "-"]
ODD += ['"', "=?", "\t"]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "FOO"]
NAMES = ["Host", "Range", "If-Range", "If-Modified-Since", "If-Match", "If-None-Match", "Content-Length", "Expect"]
NAMES += ["Upload-Offset", "Upload-Length", "Upload-Metadata", "Upload-Defer-Length", "X-HTTP-Method-Override"]
NAMES += ["Tus-Resumable", "Content-Type", "Content-Encoding", "Content-Range", "Transfer-Encoding", "Upgrade"]
NAMES += ["Connection", "Accept"]


def requests(seed: int, links: list[str]) -> Iterator[bytes]:
    """Yield raw requests without end."""
    dice = random.Random(seed)
    while True:
        target = dice.choice([*links, "/health", "/", "*", "/put/x", "/get/a/b/c", "http://[x/health"])
        if dice.random() < 0.6:
            target += dice.choice(["?", "&", "/", "#"]) + dice.choice(["until=", "x=", "length=", "metadata=", ""])
            target += dice.choice(ODD)
        headers = {"Host": "x"} | (TUS if dice.random() < 0.7 else {})
        for name in dice.sample(NAMES, dice.randint(0, 4)):
            headers[name] = dice.choice([*ODD, *METHODS, "websocket", "100-continue", "upgrade", "0", "10", "chunked"])
        lines = [f"{dice.choice(METHODS)} {target} HTTP/1.{dice.choice('01')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        body = dice.choice([b"", b"abc", b"0\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n"])
        yield "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body


@pytest.mark.parametrize("seed", range(4))
def test_no_request_ends_in_a_500(service: Service, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    """Every request is answered or refused, and no exception is logged."""
    put_image(service)
    links = [link_to_object(service), *(url_of(service, upload_link(service, id=each)) for each in ("8", "9"))]
    for request in itertools.islice(requests(seed, links), 150):
        with connect(service) as peer:
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
            answer = rest(peer)
        assert not 500 <= status(answer) < 600 or status(answer) == 503, request
        assert b"set-cookie" not in answer.lower().split(b"\r\n\r\n")[0], request
    assert [each.getMessage() for each in caplog.records if each.exc_info or each.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("host", ["[", "[::1", "a b", "\x80", "x" * 300, "evil.example"])
def test_odd_host(service: Service, host: str) -> None:
    """The Host header affects neither an answer nor an error."""
    at = url_of(service, upload_link(service))
    for method, path in (("GET", "/health/"), ("GET", at), ("POST", at), ("PUT", at)):
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Upload-Length: 10", "Tus-Resumable: 1.0.0"]
        with connect(service) as peer:
            peer.sendall("\r\n".join([*lines, "Connection: close", "Content-Length: 0", "", ""]).encode("latin-1"))
            answer = rest(peer)
        assert status(answer) < 500
        assert b"evil.example" not in answer


def test_sender_that_leaves_a_patch(service: Service) -> None:
    """Parts of an upload with wrong offsets and types are refused with a 4xx."""
    at = url_of(service, upload_link(service))
    for headers in ({"Upload-Offset": "x"}, {}, {"Upload-Offset": "9" * 400}):
        answer = service.request("PATCH", f"{at}&length={len(IMAGE)}", headers=PATCH | headers, body=b"abc")
        assert answer.status == 400
