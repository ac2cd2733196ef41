"""The files of the agent's certificate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from ssvm_worker.cloudstack.certificates import CertificateFiles
from ssvm_worker.cloudstack.link import LinkTrust
from ssvm_worker.demo.cloudstack.authority import RootAuthority
from ssvm_worker.errors import ConfigError, StoreDenied


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    """Paths without files."""
    return CertificateFiles(tmp_path / "cloud.crt", tmp_path / "cloud.key", None)


def certificate_for(key_file: Path) -> str:
    """Return a certificate for the key of that file."""
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "s-1-VM")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def test_certificate_for_a_requested_key(files: CertificateFiles, tmp_path: Path) -> None:
    """A certificate without a key belongs to the key of the last request, and both can then be used."""
    request = x509.load_pem_x509_csr(files.request("s-1-VM", "192.0.2.7").encode())
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7"]
    files.install(certificate_for(tmp_path / "cloud.new"), None, None)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cloud.crt", "cloud.key"]
    LinkTrust(certificate_file=files.certificate, key_file=files.key).context()


def test_certificate_for_the_present_key(files: CertificateFiles, authority: RootAuthority) -> None:
    """A certificate without a key and without a request keeps the present key."""
    issued = authority.issue("127.0.0.1")
    files.install(issued.certificate.read_text(), issued.key.read_text(), "ignored without ca_file")
    files.install(certificate_for(issued.key), None, None)
    assert files.key.read_text() == issued.key.read_text()


@pytest.mark.parametrize("certificate", ["", "text", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"])
def test_damaged(files: CertificateFiles, authority: RootAuthority, tmp_path: Path, certificate: str) -> None:
    """A damaged certificate changes nothing."""
    issued = authority.issue("127.0.0.1")
    with pytest.raises(ConfigError, match="keeps the old one"):
        files.install(certificate, issued.key.read_text(), None)
    assert list(tmp_path.iterdir()) == []


def test_no_directory(authority: RootAuthority, tmp_path: Path) -> None:
    """A directory that does not exist is an error with its path."""
    files = CertificateFiles(tmp_path / "sub/cloud.crt", tmp_path / "sub/cloud.key", None)
    issued = authority.issue("127.0.0.1")
    with pytest.raises(StoreDenied, match=r"sub/cloud\.crt"):
        files.install(issued.certificate.read_text(), issued.key.read_text(), None)
    with pytest.raises(ConfigError, match="cannot be made"):
        files.request("s-1-VM", "127.0.0.1")


def test_no_openssl(files: CertificateFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without openssl the error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="Install openssl"):
        files.request("s-1-VM", "127.0.0.1")
