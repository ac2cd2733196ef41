"""The certificate of the management server: the service shows the newest that is usable."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable
from typing import Any

import pytest
import trustme
import urllib3

from ssvm_worker.errors import ConfigError
from ssvm_worker.ledger.cloudstack_web import CloudStackWeb, WebCertificate
from ssvm_worker.wiring import assembly
from tests.servers.service import Service
from tests.waiting import until


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    return start_service(cloudstack=True, certificate_from_cloudstack=True)


@pytest.fixture
def web(service: Service) -> CloudStackWeb:
    return assembly.open_cloudstack_web(service.settings)


def issued(authority: trustme.CA) -> WebCertificate:
    found = authority.issue_cert("127.0.0.1")
    key = found.private_key_pem.bytes().decode()
    return WebCertificate(key, found.cert_chain_pems[0].bytes().decode(), authority.cert_pem.bytes().decode())


def is_trusted(service: Service, authority: trustme.CA) -> bool:
    """Connect as a client of that authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    try:
        return service.request("GET", "/health", ssl_context=context).status == 200
    except urllib3.exceptions.SSLError:
        return False


def test_sent(service: Service, web: CloudStackWeb, caplog: pytest.LogCaptureFixture) -> None:
    """A service shows its own certificate, then the server's, then a newer one, and ignores an unusable one."""
    old, new = trustme.CA(), trustme.CA()
    assert not is_trusted(service, old)
    web.set_certificate(issued(old))
    until(lambda: is_trusted(service, old), "the certificate is in use")
    web.set_certificate(WebCertificate("no key", "no certificate"))
    until(lambda: "unusable" in caplog.text, "the service has looked at it")
    assert is_trusted(service, old)
    web.set_certificate(issued(new))
    until(lambda: is_trusted(service, new), "the newer certificate is in use")


@pytest.mark.parametrize("given", [{}, {"cloudstack": True, "certificate_file": "x.pem", "private_key_file": "x"}])
def test_contradictions(start_service: Callable[..., Service], given: dict[str, Any]) -> None:
    """A certificate from a server that is not served, and two certificates, are refused at the start."""
    with pytest.raises(ConfigError, match="certificate_from_cloudstack"):
        start_service(certificate_from_cloudstack=True, **given)


@pytest.mark.parametrize("library", ["cryptography", "python_multipart"])
def test_missing_extra(start_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Without a library of the extra, the service does not start, and names the extra."""
    for name in [each for each in sys.modules if each.startswith("ssvm_worker.serve.cloudstack")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [library, *(each for each in sys.modules if each.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{library}.*ssvm-worker\[cloudstack\]"):
        start_service(cloudstack=True)
