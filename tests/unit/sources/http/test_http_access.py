"""HTTP access: only public or listed addresses at every hop, and only authenticated servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ssvm_worker.errors import SourceDenied
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources.http.source import HttpSource
from ssvm_worker.sources.options import HttpSettings
from tests.contracts.source import DATA, gather
from tests.servers.http import HttpServer

LOOPBACK = HttpSettings(AddressRule(("127.0.0.0/8",)))


def source(url: str, **more: object) -> HttpSource:
    """Return a source that may use loopback."""
    return HttpSource(url, LOOPBACK, **more)  # type: ignore[arg-type]


def trusting(server: HttpServer, directory: Path) -> HttpSettings:
    """Return settings that trust the server's authority."""
    return dataclasses.replace(LOOPBACK, ca_file=server.ca_file(directory))


# Addresses


def test_address_refused(http_server: HttpServer) -> None:
    """Loopback is refused unless listed, and the error names the address, the rule and the setting."""
    with pytest.raises(SourceDenied, match=r"127\.0\.0\.1.*loopback.*download\.allow_networks"):
        gather(HttpSource(http_server.serve("image", DATA), HttpSettings()))
    assert not http_server.requests


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"authorization": "Bearer wrong"}, r"refused the user, password or token.*Correct the credentials"),
        ({"X-Other": "1"}, r"refused the request .*Give headers or credentials"),
    ],
    ids=str,
)
def test_wrong_password(http_server: HttpServer, status: int, headers: dict[str, str], text: str) -> None:
    """Wrong credentials and missing ones have different errors."""
    url = http_server.serve("image", DATA, status=status)
    with pytest.raises(SourceDenied, match=text):
        gather(source(url, headers=headers))


def test_redirects(http_server: HttpServer) -> None:
    """Up to five redirects are followed."""
    http_server.serve("hop5", DATA)
    for hop in range(5):
        http_server.redirect(f"hop{hop}", f"/hop{hop + 1}")
    assert gather(source(http_server.url("hop0"))) == DATA


@pytest.mark.parametrize(
    ("location", "text"),
    [
        pytest.param("/image", "form a loop", id="to itself"),
        pytest.param("http://10.0.0.1/x", "private address", id="to a private address"),
        pytest.param("http://169.254.169.254/latest", "metadata", id="to cloud metadata"),
        pytest.param("file:///etc/passwd", "URL that is not allowed", id="to a file"),
        pytest.param("ftp://127.0.0.1/x", "URL that is not allowed", id="to ftp"),
        pytest.param("http://user:secret@127.0.0.1/x", "URL that is not allowed", id="with a password"),
        pytest.param("http://:80/x", "URL that is not allowed", id="to nowhere"),
    ],
)
def test_redirect_refused(http_server: HttpServer, location: str, text: str) -> None:
    """A redirect to a forbidden address is refused."""
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
    """A redirect from https to http is refused."""
    url = https_server.redirect("image", http_server.serve("image", DATA))
    with pytest.raises(SourceDenied, match="from https to http"):
        gather(HttpSource(url, trusting(https_server, tmp_path)))
    assert not http_server.requests


@pytest.fixture
def elsewhere() -> Iterator[HttpServer]:
    """Return a second origin."""
    server = HttpServer()
    yield server
    server.close()


def test_credentials_stay_with_their_origin(http_server: HttpServer, elsewhere: HttpServer) -> None:
    """The caller's headers are sent only within the origin, and not after a redirect away and back."""
    http_server.serve("last", DATA)
    elsewhere.redirect("away", http_server.url("last"))
    http_server.redirect("here", elsewhere.url("away"))
    url = http_server.redirect("image", "/here")
    assert gather(source(url, headers={"Authorization": "Bearer s", "Cookie": "c"})) == DATA
    assert [each.headers["Authorization"] for each in http_server.requests] == ["Bearer s", "Bearer s", None]
    assert {name for each in elsewhere.requests for name in each.headers} & {"Authorization", "Cookie"} == set()


# TLS


def test_untrusted_certificate(https_server: HttpServer) -> None:
    """A certificate of an unknown authority is refused, with the remedy."""
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
    """A wrong certificate of a trusted authority is refused."""
    server = HttpServer(tls=True, **certificate)  # type: ignore[arg-type]
    with pytest.raises(SourceDenied, match=text):
        gather(HttpSource(server.serve("image", DATA), trusting(server, tmp_path)))
    server.close()
