"""The root certificate authority of a simulated management server, and the certificates that it issues."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

#: The common name of CloudStack's own authority.
_NAME = "ca.cloudstack.apache.org"
#: Makes OpenSSL accept an expired certificate (X509_V_FLAG_NO_CHECK_TIME): ca.plugin.root.allow.expired.cert.
_NO_CHECK_TIME = 0x200000


@dataclass(frozen=True)
class IssuedCertificate:
    """What ``issueCertificate`` returns, as the files that ``ssvm agent`` reads."""

    certificate: Path
    key: Path
    ca: Path

    @property
    def serial(self) -> int:
        """Return the serial number."""
        return x509.load_pem_x509_certificate(self.certificate.read_bytes()).serial_number


class RootAuthority:
    """A certificate authority. The server also shows its certificate as its own, as CloudStack does."""

    def __init__(self, directory: Path) -> None:
        """Create a key and a certificate in *directory*, which must exist."""
        self.directory = directory
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
        now = datetime.now(UTC)
        usage = {each: False for each in ("content_commitment", "key_encipherment", "data_encipherment")}
        # A client that verifies a server's certificate with OpenSSL refuses this key usage.
        usage |= {"digital_signature": False, "key_agreement": False, "key_cert_sign": True, "crl_sign": True}
        certificate = (
            self._builder(self._name, self._key, now - timedelta(days=1), now + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage, encipher_only=False, decipher_only=False), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate_file = directory / "cloud.ca.crt"
        self.certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self._key_file = directory / "ca.key"
        self._key_file.write_bytes(_pem(self._key))
        self.fingerprint = certificate.fingerprint(hashes.SHA256()).hex()

    def issue(
        self, *addresses: str, name: str = "s-1-VM", days: float = 365, starts_in_days: float = -400
    ) -> IssuedCertificate:
        """Return a certificate for *addresses* that is valid for *days* from now; negative days mean it has expired."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        now = datetime.now(UTC)
        names = [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
        certificate = (
            self._builder(
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
                key,
                now + timedelta(days=starts_in_days),
                now + timedelta(days=days),
            )
            .add_extension(x509.SubjectAlternativeName([*names, x509.DNSName(name)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        directory = self.directory / f"issued-{certificate.serial_number:x}"
        directory.mkdir()
        paths = IssuedCertificate(directory / "cloud.crt", directory / "cloud.key", directory / "cloud.ca.crt")
        paths.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths.key.write_bytes(_pem(key))
        paths.ca.write_bytes(self.certificate_file.read_bytes())
        return paths

    def context(self, *, strict: bool, allow_expired: bool) -> ssl.SSLContext:
        """Return the TLS settings of a server: ca.plugin.root.auth.strictness and ca.plugin.root.allow.expired.cert.

        A server that is not strict asks for no certificate here. Java's asks for one and accepts any.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate_file, self._key_file)
        if strict:
            context.load_verify_locations(self.certificate_file)
            context.verify_mode = ssl.CERT_OPTIONAL  # the server itself refuses a client without a certificate
            if allow_expired:
                context.verify_flags |= _NO_CHECK_TIME
        return context

    def _builder(
        self, subject: x509.Name, key: rsa.RSAPrivateKey, start: datetime, end: datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(subject_name=subject, issuer_name=self._name, public_key=key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )


def _pem(key: rsa.RSAPrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())
