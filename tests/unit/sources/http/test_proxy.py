"""Configured proxies: their use, with the address rule as far as the worker can check it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import ConfigError, SourceDenied, SourceUnavailable
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.proxy import Proxy, parse_proxy
from ssvm_worker.sources.http.source import HttpSource
from ssvm_worker.sources.options import HttpSettings
from tests.contracts.source import DATA, gather
from tests.servers.http import HttpServer
from tests.servers.proxy import ProxyServer

LOOPBACK = AddressRule(("127.0.0.0/8",))


@pytest.fixture
def proxy() -> Iterator[ProxyServer]:
    """Return a proxy that resolves every name to loopback."""
    server = ProxyServer()
    yield server
    server.close()


def settings(proxy: ProxyServer, *bypassed: str, user: str = "") -> HttpSettings:
    return HttpSettings(LOOPBACK, proxy=parse_proxy(f"http://{user}127.0.0.1:{proxy.port}", bypassed))


def test_http(http_server: HttpServer, proxy: ProxyServer) -> None:
    """A plain request goes to the proxy with its full URL, and the proxy resolves the name."""
    http_server.serve("image", DATA)
    assert gather(HttpSource(http_server.url("image", host="image.example"), settings(proxy))) == DATA
    assert proxy.asked == [f"GET http://image.example:{http_server.port}/image"]


def test_https(https_server: HttpServer, proxy: ProxyServer, tmp_path: Path) -> None:
    """TLS goes through a tunnel to the server itself."""
    trusting = dataclasses.replace(settings(proxy), ca_file=https_server.ca_file(tmp_path))
    assert gather(HttpSource(https_server.serve("image", DATA), trusting)) == DATA
    assert proxy.asked == [f"CONNECT 127.0.0.1:{https_server.port}"]


def test_tls_is_checked_through_the_tunnel(https_server: HttpServer, proxy: ProxyServer) -> None:
    """A proxy cannot impersonate the server."""
    with pytest.raises(SourceDenied, match="not trusted"):
        gather(HttpSource(https_server.serve("image", DATA), settings(proxy)))


def test_credentials_of_the_proxy(https_server: HttpServer, proxy: ProxyServer, tmp_path: Path) -> None:
    """The proxy's user and password are sent to the proxy, and never to the server."""
    asked = dataclasses.replace(settings(proxy, user="joe:s%40cret@"), ca_file=https_server.ca_file(tmp_path))
    gather(HttpSource(https_server.serve("image", DATA), asked))
    assert proxy.authorizations == ["Basic am9lOnNAY3JldA=="]
    assert "Proxy-Authorization" not in https_server.requests[0].headers


@pytest.mark.parametrize(("status", "error"), [(403, SourceDenied), (407, SourceDenied), (502, SourceUnavailable)])
def test_refused(https_server: HttpServer, proxy: ProxyServer, status: int, error: type[Exception]) -> None:
    """A proxy's answer determines whether a retry may help, and the error names the proxy."""
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
    """A forbidden target address in any notation never reaches the proxy."""
    with pytest.raises(SourceDenied):
        gather(HttpSource(url, settings(proxy)))
    assert not proxy.asked


def test_redirect_to_a_forbidden_address(http_server: HttpServer, proxy: ProxyServer) -> None:
    """A redirect to a forbidden address never reaches the proxy either."""
    http_server.redirect("image", "http://169.254.169.254/latest")
    with pytest.raises(SourceDenied, match="metadata"):
        gather(HttpSource(http_server.url("image", host="image.example"), settings(proxy)))


def test_the_proxy_must_be_allowed(http_server: HttpServer, proxy: ProxyServer) -> None:
    """A proxy on a private address needs a listed network."""
    strict = dataclasses.replace(settings(proxy), rule=AddressRule())
    with pytest.raises(SourceDenied, match="loopback"):
        gather(HttpSource(http_server.url("image", host="image.example"), strict))


def test_no_proxy(http_server: HttpServer, proxy: ProxyServer) -> None:
    """Hosts in no_proxy are reached without the proxy."""
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
    """no_proxy lists names with their subdomains, addresses and networks."""
    assert Proxy("p", 1, "", (".example.org", "10.1.0.0/16", "fd00::/8")).serves(host) is serves


@pytest.mark.parametrize("url", ["https://p:1", "socks5://p:1", "p:1", "http://p:99999", "http://p/path", "http://"])
def test_bad_proxy(url: str) -> None:
    """Only http proxies are accepted."""
    with pytest.raises(ConfigError):
        parse_proxy(url)
