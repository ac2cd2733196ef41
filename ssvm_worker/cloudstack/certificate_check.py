"""Find out why a management server refuses an agent: what the server shows, and what is wrong with our certificate."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes

from .link import LinkTrust

#: TLS: the type of a record with handshake messages, and that of the message Certificate.
_HANDSHAKE, _CERTIFICATE = 22, 11
#: The maximum of bytes that the search reads for the server's certificate.
_MAX_BYTES = 1 << 20
#: A management server renews certificates so many days before their end (ca.framework.cert.expiry.alert.period).
_RENEWAL = timedelta(days=15)


@dataclass(frozen=True)
class ShownServer:
    """What a server shows to everyone that connects."""

    #: The address of this host that the connection comes from.
    local_address: str
    #: The certificate in DER, or b"" if the server sent none.
    certificate: bytes


def look_at(host: str, port: int, timeout_s: float) -> ShownServer:
    """Start a TLS handshake and return what it shows, even if the server then refuses this agent.

    TLS 1.2 sends the server's certificate in clear text (RFC 5246, section 7.4.2). Raises OSError if the server cannot
    be reached.
    """
    context = LinkTrust().context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    data, messages, until = b"", b"", time.monotonic() + timeout_s
    with socket.create_connection((host, port), timeout_s) as connection:
        local = connection.getsockname()[0]
        connection.sendall(outgoing.read())
        while len(data) < _MAX_BYTES and time.monotonic() < until:
            while len(data) >= 5 and len(data) >= (end := 5 + int.from_bytes(data[3:5], "big")):
                messages += data[5:end] if data[0] == _HANDSHAKE else b""
                data = data[end:]
            if (found := _certificate_in(messages)) is not None:
                return ShownServer(local, found)
            try:
                piece = connection.recv(1 << 16)
            except OSError:
                piece = b""
            if not piece:
                break
            data += piece
    return ShownServer(local, b"")


def _certificate_in(messages: bytes) -> bytes | None:
    """Return the first certificate of the message Certificate, or None if the message is not complete."""
    while len(messages) >= 4:
        kind, length = messages[0], int.from_bytes(messages[1:4], "big")
        if len(messages) < 4 + length:
            return None
        if kind == _CERTIFICATE:
            size = int.from_bytes(messages[7:10], "big")
            return messages[10 : 10 + size]
        messages = messages[4 + length :]
    return None


def describe_certificate(certificate: bytes) -> str:
    """Return subject and fingerprint of a certificate in DER."""
    try:
        found = x509.load_der_x509_certificate(certificate)
    except ValueError:
        return "a damaged certificate"
    return f"{found.subject.rfc4514_string()} sha256:{found.fingerprint(hashes.SHA256()).hex()}"


def problems_of(file: Path, key: Path, local_address: str, authorities: list[bytes]) -> list[str]:
    """Return what is wrong with the agent's certificate, each with its remedy. [] means that a strict server takes it.

    *local_address*: that of this host for a server, or "" if it is unknown.
    *authorities*: certificates that servers have shown. Raises OSError if a file cannot be read.
    """
    new = f"Get a new one: issueCertificate ipaddress={local_address or 'ADDRESS'}"
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        key.read_bytes()
    except ValueError:
        return [f"{file} contains no PEM certificate. {new}"]
    found = []
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(file, key)
    except ssl.SSLError as error:
        found.append(f"{key} is not its key ({error.reason}). Copy certificate and key together")
    found += _times(certificate, new)
    names = _names(certificate)
    if local_address and local_address not in names:
        given = ", ".join(names) or "nothing"
        found.append(f"it names {given}, but this host connects from {local_address}. {new}")
    for shown in authorities:
        if not _is_issued_by(certificate, shown):
            issuer = certificate.issuer.rfc4514_string()
            found.append(f"its issuer {issuer} is not the server's authority {describe_certificate(shown)}. {new}")
    return found


def _times(certificate: x509.Certificate, new: str) -> list[str]:
    now = datetime.now(UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        return [f"it is valid from {start:%Y-%m-%d %H:%M} UTC, and this host has {now:%Y-%m-%d %H:%M}. Set the clock"]
    if now > end:
        return [f"it has expired on {end:%Y-%m-%d}. {new}"]
    if now > end - _RENEWAL:
        return [f"it expires on {end:%Y-%m-%d}. {new}"]
    return []


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(each) for each in names.get_values_for_type(x509.IPAddress)]
    return addresses + names.get_values_for_type(x509.DNSName)


def _is_issued_by(certificate: x509.Certificate, authority: bytes) -> bool:
    try:
        certificate.verify_directly_issued_by(x509.load_der_x509_certificate(authority))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
