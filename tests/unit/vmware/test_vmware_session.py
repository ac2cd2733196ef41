"""Trust in a vCenter's certificate, and the errors of sessions that cannot start."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.errors import ConfigError, SourceDenied, SourceUnavailable
from ssvm_worker.net.tls import parse_thumbprint
from ssvm_worker.vmware.session import Address, VCenterSession
from tests.servers.http import HttpServer
from tests.servers.vcenter import address_of


def certificate(vcenter: VCenterSimulator) -> bytes:
    """Return the DER of the server's certificate."""
    return ssl.PEM_cert_to_DER_cert(vcenter.ca_file.read_text())


def colons(text: str) -> str:
    """Return a thumbprint in vSphere's notation."""
    return ":".join(re.findall("..", text.upper()))


@pytest.mark.parametrize("form", [str, colons], ids=["plain", "with colons"])
@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_pinned(vcenter: VCenterSimulator, algorithm: str, form: Any) -> None:
    """A certificate with the pinned SHA-1 or SHA-256 thumbprint needs no authority."""
    pin = form(hashlib.new(algorithm, certificate(vcenter)).hexdigest())
    with VCenterSession(address_of(vcenter, ca_file=None, thumbprint=pin)) as session:
        assert "vCenter" in session.about


def test_authority(vcenter: VCenterSimulator) -> None:
    """A certificate of the configured authority is trusted, and the session ends with a logout."""
    before = vcenter.state()["calls"].get("Logout", 0)
    with VCenterSession(address_of(vcenter)) as session:
        assert session.about
    assert vcenter.state()["calls"]["Logout"] == before + 1


@pytest.mark.parametrize("address", [{"ca_file": None}, {"thumbprint": "ab" * 20}], ids=["no authority", "another pin"])
def test_untrusted(vcenter: VCenterSimulator, address: dict[str, Any]) -> None:
    """An untrusted certificate is refused before the password is sent, and the error names its thumbprint."""
    before = vcenter.state()["calls"].get("Login", 0)
    with pytest.raises(SourceDenied) as caught, VCenterSession(address_of(vcenter, **address)):
        pass
    shown = hashlib.sha256(certificate(vcenter)).hexdigest()
    assert shown in str(caught.value)
    assert "thumbprint" in caught.value.remedy
    assert vcenter.state()["calls"].get("Login", 0) == before


def test_wrong_password(vcenter: VCenterSimulator) -> None:
    """A wrong password is refused, and is not shown."""
    with pytest.raises(SourceDenied, match="user name or password") as caught:
        VCenterSession(address_of(vcenter, password="hunter2")).__enter__()
    assert "hunter2" not in str(caught.value)


def test_secrets() -> None:
    """An address is safe to log, because it omits the password."""
    assert "hunter2" not in repr(Address("vc.example", "user", "hunter2"))


def test_nobody_there(vcenter: VCenterSimulator) -> None:
    """A closed port is a temporary error."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(SourceUnavailable):
            VCenterSession(address_of(vcenter, port=closed.getsockname()[1])).__enter__()


def test_silent(vcenter: VCenterSimulator) -> None:
    """A port that accepts but never answers times out."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(SourceUnavailable):
        VCenterSession(address_of(vcenter, port=silent.getsockname()[1], timeout_s=0.5)).__enter__()


def test_hanging(vcenter: VCenterSimulator) -> None:
    """A vCenter that accepts a call but does not answer it times out."""
    vcenter.fault(hang="Login")
    with pytest.raises(SourceUnavailable):
        VCenterSession(address_of(vcenter, timeout_s=0.5)).__enter__()


def test_no_vsphere(vcenter: VCenterSimulator, https_server: HttpServer, tmp_path: Path) -> None:
    """The error of a web server that is not vSphere says so."""
    port, ca_file = urlsplit(https_server.url("x")).port, https_server.ca_file(tmp_path)
    with pytest.raises(SourceUnavailable, match="No vSphere answers"):
        VCenterSession(address_of(vcenter, port=port, ca_file=ca_file)).__enter__()


@pytest.mark.parametrize("text", ["", "12:34", "zz" * 20, "ab" * 64])
def test_bad_thumbprint(text: str) -> None:
    """An invalid thumbprint is an error of the settings."""
    with pytest.raises(ConfigError):
        parse_thumbprint(text, "vc1")


def test_bad_ca_file(vcenter: VCenterSimulator, tmp_path: Path) -> None:
    """A CA file without a certificate is an error of the settings."""
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ConfigError):
        VCenterSession(address_of(vcenter, ca_file=tmp_path / "ca.pem")).__enter__()
