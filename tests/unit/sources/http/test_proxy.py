"""Proxies of the settings: used where they serve, with the address rule applied to what can still be judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import ConfigError, SourceDenied, SourceUnavailable
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources.http.proxy import Proxy, parse_proxy
from ssvm_worker.sources.http.request import HttpSettings
from ssvm_worker.sources.http.source import HttpSource
from tests.contracts.source import DATA, gather
from tests.servers.http import HttpServer
from tests.servers.proxy import ProxyServer

LOOPBACK = AddressRule(("127.0.0.0/8",))


@pytest.fixture
def proxy() -> Iterator[ProxyServer]:
    """A proxy that knows every name as loopback."""
    server = ProxyServer()
    yield server
    server.close()


def settings(proxy: ProxyServer, *bypassed: str, user: str = "") -> HttpSettings:
    return HttpSettings(LOOPBACK, proxy=parse_proxy(f"http://{user}127.0.0.1:{proxy.port}", bypassed))


def test_http(http_server: HttpServer, proxy: ProxyServer) -> None:
    """A plain request goes to the proxy with its whole URL, and the name is the proxy's to look up."""
    http_server.serve("image", DATA)
    assert gather(HttpSource(http_server.url("image", host="image.example"), settings(proxy))) == DATA
    assert proxy.asked == [f"GET http://image.example:{http_server.port}/image"]


def test_https(https_server: HttpServer, proxy: ProxyServer, tmp_path: Path) -> None:
    """TLS goes through a tunnel, to the server itself."""
    trusting = dataclasses.replace(settings(proxy), ca_file=https_server.ca_file(tmp_path))
    assert gather(HttpSource(https_server.serve("image", DATA), trusting)) == DATA
    assert proxy.asked == [f"CONNECT 127.0.0.1:{https_server.port}"]


def test_tls_is_checked_through_the_tunnel(https_server: HttpServer, proxy: ProxyServer) -> None:
    """A proxy cannot stand in for the server."""
    with pytest.raises(SourceDenied, match="not trusted"):
        gather(HttpSource(https_server.serve("image", DATA), settings(proxy)))


def test_credentials_of_the_proxy(https_server: HttpServer, proxy: ProxyServer, tmp_path: Path) -> None:
    """User and password of the proxy are sent to the proxy, and the server never sees them."""
    asked = dataclasses.replace(settings(proxy, user="joe:s%40cret@"), ca_file=https_server.ca_file(tmp_path))
    gather(HttpSource(https_server.serve("image", DATA), asked))
    assert proxy.authorizations == ["Basic am9lOnNAY3JldA=="]
    assert "Proxy-Authorization" not in https_server.requests[0].headers


@pytest.mark.parametrize(("status", "error"), [(403, SourceDenied), (407, SourceDenied), (502, SourceUnavailable)])
def test_refused(https_server: HttpServer, proxy: ProxyServer, status: int, error: type[Exception]) -> None:
    """What the proxy answers says whether another try makes sense, and that it was the proxy."""
    proxy.status = status
    with pytest.raises(error, match=f"proxy.*{status}"):
        gather(HttpSource(https_server.serve("image", DATA), settings(proxy)))


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "https://169.254.169.254/latest",
        "http://2852039166/latest",
        "http://0xa9fea9fe/latest",
        "http://[::ffff:169.254.169.254]/latest",
        "http://localhost/",
        "http://a.localhost./",
    ],
)
def test_forbidden_addresses(proxy: ProxyServer, url: str) -> None:
    """A target that is given as a forbidden address, in any notation, never reaches the proxy."""
    with pytest.raises(SourceDenied):
        gather(HttpSource(url, settings(proxy)))
    assert not proxy.asked


def test_redirect_to_a_forbidden_address(http_server: HttpServer, proxy: ProxyServer) -> None:
    """The same holds for where a server redirects to."""
    http_server.redirect("image", "http://169.254.169.254/latest")
    with pytest.raises(SourceDenied, match="metadata"):
        gather(HttpSource(http_server.url("image", host="image.example"), settings(proxy)))


def test_the_proxy_must_be_allowed(http_server: HttpServer, proxy: ProxyServer) -> None:
    """A proxy on a private address needs its network listed."""
    strict = dataclasses.replace(settings(proxy), rule=AddressRule())
    with pytest.raises(SourceDenied, match="loopback"):
        gather(HttpSource(http_server.url("image", host="image.example"), strict))


def test_no_proxy(http_server: HttpServer, proxy: ProxyServer) -> None:
    """What is listed in no_proxy is reached without it."""
    assert gather(HttpSource(http_server.serve("image", DATA), settings(proxy, "127.0.0.0/8"))) == DATA
    assert not proxy.asked


@pytest.mark.parametrize(
    ("host", "serves"),
    [
        ("example.org", False),
        ("a.example.org", False),
        ("badexample.org", True),
        ("10.1.2.3", False),
        ("10.2.2.3", True),
        ("fd00::1", False),
        ("EXAMPLE.ORG", False),
    ],
)
def test_bypassed(host: str, serves: bool) -> None:
    """no_proxy has names with all below them, addresses and networks."""
    assert Proxy("p", 1, "", (".example.org", "10.1.0.0/16", "fd00::/8")).serves(host) is serves


@pytest.mark.parametrize("url", ["https://p:1", "socks5://p:1", "p:1", "http://p:99999", "http://p/path", "http://"])
def test_bad_proxy(url: str) -> None:
    """Only an http proxy is one."""
    with pytest.raises(ConfigError):
        parse_proxy(url)
