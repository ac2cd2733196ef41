"""The HTTP client sends what it is given to allowed and verified servers, and nothing else."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import pytest

from ssvm_worker.errors import Cancelled
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.http import HttpOptions, HttpResponse, HttpSession, HttpUpload
from ssvm_worker.net.sockets import AddressRefused, Stalled
from ssvm_worker.net.tls import PinMismatch, context_for, thumbprint
from ssvm_worker.net.urls import parse
from tests.neighbours import free_port
from tests.servers.raw import RawServer, Serve
from tests.waiting import PATIENCE_S

LOOPBACK = HttpOptions(AddressRule(("127.0.0.0/8",)))
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def ask(url: str, options: HttpOptions = LOOPBACK, method: str = "GET", **headers: str) -> HttpResponse:
    """Return the response to a request without a body."""
    return HttpSession(options).exchange(method, parse(url), headers)


def start(url: str, options: HttpOptions = LOOPBACK) -> HttpUpload:
    """Send the head of an upload."""
    return HttpUpload(HttpSession(options), "PUT", parse(url), {}, 1)


def read(url: str) -> bytes:
    """Return the body of the response."""
    response = ask(url)
    return b"".join(iter(lambda: response.read(10), b""))


def served(raw_server: Serve, answer: bytes = EMPTY, *, tls: bool = False) -> RawServer:
    return raw_server(lambda connection, _: connection.sendall(answer), tls=tls)


@pytest.mark.parametrize("method", ["GET", "PUT", "POST"])
def test_environment(raw_server: Serve, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No method uses proxies of the environment or passwords of a .netrc file."""
    server = served(raw_server)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ann password sesame\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")

    assert ask(server.url, method=method).status_code == 200
    assert b"uthorization" not in server.heads[0]


def test_headers(raw_server: Serve) -> None:
    """The request has the given headers and those of the connection, and none of requests."""
    server = served(raw_server)
    ask(server.url, **{"X-Token": "t"})
    names = re.findall(rb"(?m)^([A-Za-z-]+):", server.heads[0])
    assert sorted(names) == [b"Accept-Encoding", b"Connection", b"Host", b"User-Agent", b"X-Token"]


@pytest.mark.parametrize("target", [b"/a%2fb/%7ec/../d?X-Amz-Signature=a%2Bb%2fc&e=~", b"//x/./y"])
def test_target(raw_server: Serve, target: bytes) -> None:
    """The server gets the path and the query as they were given, because they may be signed."""
    server = served(raw_server)
    ask(server.url.removesuffix("/image") + target.decode())
    assert server.heads[0].split(b" ")[1] == target


def test_cookies(raw_server: Serve) -> None:
    """A session sends no cookies back."""
    server = served(raw_server, EMPTY.replace(b"\r\n\r\n", b"\r\nSet-Cookie: id=1; Path=/\r\n\r\n"))
    session = HttpSession(LOOPBACK)
    for _ in range(2):
        session.exchange("GET", parse(server.url), {})
    assert [b"ookie" in head for head in server.heads] == [False, False]


def test_other_origin(raw_server: Serve) -> None:
    """A kept connection serves its own origin only."""
    servers = [served(raw_server), served(raw_server)]
    session = HttpSession(LOOPBACK, keep=True)
    for each in servers:
        session.exchange("GET", parse(each.url), {}).read(1)
    assert [len(each.heads) for each in servers] == [1, 1]


def test_body_of_a_redirect(raw_server: Serve) -> None:
    """A redirect is returned at once, and its body is not read."""
    server = served(raw_server, b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 99999999\r\n\r\n")
    assert ask(server.url).headers["Location"] == "/x"


def test_content_coding(raw_server: Serve) -> None:
    """A body is never decoded."""
    server = served(raw_server, b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd")
    assert ask(server.url).read(10) == b"abcd"


@pytest.mark.parametrize("send", [ask, start])
def test_address_rule(raw_server: Serve, send: Callable[..., object]) -> None:
    """No method connects to a forbidden address."""
    server = served(raw_server)
    with pytest.raises(AddressRefused):
        send(server.url, HttpOptions())
    assert server.heads == []


@pytest.mark.parametrize("send", [ask, start])
def test_pin(raw_server: Serve, send: Callable[..., object]) -> None:
    """A server with another certificate than the pinned one gets no request."""
    server = served(raw_server, tls=True)
    options = HttpOptions(LOOPBACK.rule, tls=context_for(None, "any"), pin="ab" * 32)
    with pytest.raises(PinMismatch):
        send(server.url, options)
    assert server.heads == []


def test_pinned_server(raw_server: Serve) -> None:
    """A server with the pinned certificate needs no authority."""
    server = served(raw_server, tls=True)
    pin = thumbprint(ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", server.port))))
    options = HttpOptions(LOOPBACK.rule, tls=context_for(None, pin), pin=pin)
    assert ask(server.url, options).status_code == 200


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na",
    ],
    ids=["another protocol", "an invalid length", "a short body"],
)
def test_broken_http(raw_server: Serve, answer: bytes) -> None:
    """An answer that breaks the rules of HTTP is an HTTPException."""
    server = served(raw_server, answer)
    with pytest.raises(HTTPException):
        read(server.url)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("size", [3, 1000])
def test_early_answer(raw_server: Serve, tls: bool, size: int, tmp_path: Path) -> None:
    """An upload ends at an answer that arrives before its end, in any pieces, even if the server reads on."""
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 403 Forbidden\r\nContent-Length: 5\r\n\r\nwhy?\n"

    def refuse(connection: socket.socket, _: bytes) -> None:
        for start in range(0, len(answer), size):
            connection.sendall(answer[start : start + size])
        while connection.recv(1 << 20):
            pass

    server = raw_server(refuse, tls=tls)
    options = replace(LOOPBACK, ca_file=server.ca_file(tmp_path) if tls else None)
    upload = HttpUpload(HttpSession(options), "PUT", parse(server.url), {}, 1 << 50)
    until, found = time.monotonic() + PATIENCE_S, None
    while found is None and time.monotonic() < until:
        found = upload.send(bytes(1 << 16))

    assert found is not None
    assert (found.status_code, b"".join(iter(lambda: found.read(10), b""))) == (403, b"why?\n")


def test_stall(raw_server: Serve) -> None:
    """A server that does not answer a POST is stalled."""
    server = raw_server(lambda *_: server.closing.wait(PATIENCE_S))
    with pytest.raises(Stalled):
        HttpSession(HttpOptions(LOOPBACK.rule, stall_s=0.6)).exchange("POST", parse(server.url), {}, b"x")


def test_cancel(raw_server: Serve) -> None:
    """The error of the check ends every wait."""
    server = raw_server(lambda *_: server.closing.wait(PATIENCE_S))

    def check() -> None:
        if server.heads:
            raise Cancelled("user")

    with pytest.raises(Cancelled):
        HttpSession(LOOPBACK, check).exchange("GET", parse(server.url), {})
