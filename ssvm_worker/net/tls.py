"""Trust of TLS peers: authorities of the system, own authorities, or a pinned certificate. Standard library only."""

from __future__ import annotations

import hashlib
import hmac
import re
import ssl
from pathlib import Path

from ssvm_worker.errors import ConfigError

#: The hash algorithms of a thumbprint by its number of hex digits. vSphere writes SHA-1, newer tools write SHA-256.
_ALGORITHMS = {40: "sha1", 64: "sha256"}


class PinMismatch(ssl.SSLError):
    """Error for a peer whose certificate is not the pinned one."""


def tls_context(*ca_files: str | None, certificate: str | None = None) -> ssl.SSLContext:
    """Return a client context that verifies peers. It requires TLS 1.2 and trusts the CAs of the system and the files.

    *certificate* is a PEM file with a client certificate and its key. Raises ConfigError for an invalid file.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for ca_file in filter(None, ca_files):
        _trust(context, ca_file)
    try:
        if certificate:
            context.load_cert_chain(certificate)
    except OSError as error:
        what = f"Certificate and key cannot be read: {error}"
        raise ConfigError(what, certificate or "", "Give both in one PEM file as certificate_file") from error
    return context


def context_for(ca_file: Path | str | None, pin: str | None) -> ssl.SSLContext:
    """Return a client context that trusts *ca_file*, or the system's authorities without it.

    With a pin, the context accepts every certificate: ``require_pin`` must follow the handshake.
    Raises ConfigError for an unreadable file.
    """
    if not pin and not ca_file:
        return tls_context()
    # This context does not need the system's authorities, which take 50 ms to load.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if pin:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        _trust(context, str(ca_file))
    return context


def _trust(context: ssl.SSLContext, ca_file: str) -> None:
    try:
        context.load_verify_locations(ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"The certificates cannot be read: {error}", ca_file, "Give a PEM file as ca_file") from error


def parse_thumbprint(text: str, where: str) -> str:
    """Return a SHA-1 or SHA-256 thumbprint as lower-case hex; colons are optional. Raises ConfigError."""
    value = text.replace(":", "").strip().lower()
    if len(value) not in _ALGORITHMS or not re.fullmatch("[0-9a-f]+", value):
        raise ConfigError("Invalid SHA-1 or SHA-256 thumbprint", where, "Give 40 or 64 hex digits; colons are optional")
    return value


def thumbprint(der: bytes, length: int = 64) -> str:
    """Return the thumbprint of a certificate with *length* hex digits."""
    return hashlib.new(_ALGORITHMS[length], der, usedforsecurity=False).hexdigest()


def thumbprint_of(pem: str) -> str:
    """Return the SHA-256 thumbprint of the first certificate in a PEM text, or an empty string for invalid PEM.

    A chain begins with the certificate of the peer itself (RFC 8446, section 4.4.2).
    """
    first, end, _ = pem.partition(ssl.PEM_FOOTER)
    try:
        return thumbprint(ssl.PEM_cert_to_DER_cert(first.strip() + "\n" + end))
    except ValueError:
        return ""


def require_pin(der: bytes | None, pin: str) -> None:
    """Raise PinMismatch unless the thumbprint of the certificate is *pin*, or one of several with spaces in between."""
    pins = pin.split()
    if der is None or not any(hmac.compare_digest(thumbprint(der, len(each)), each) for each in pins):
        shown = thumbprint(der, len(pins[0])) if der else "none"
        raise PinMismatch(f"the certificate's thumbprint is {shown}, not {pin}")
