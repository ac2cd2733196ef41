"""The TLS certificate that the management server sends to its agents, for the zone's web servers.

An agent stores it in the ledger. A service shows a self-signed one until then, and each newer one within seconds.
"""

from __future__ import annotations

import logging
import socket
import ssl
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.cloudstack_web import CloudStackWeb, WebCertificate

_LOG = logging.getLogger("ssvm.serve")
#: Seconds between two looks at the ledger.
_LOOK_S = 5.0
#: The longest common name of X.509 (RFC 5280, appendix A.1).
_MAX_NAME = 64


class SentCertificate:
    """The newest certificate. Each new connection gets it, and open ones continue."""

    def __init__(self, web: CloudStackWeb) -> None:
        self._web = web
        self._shown: WebCertificate | None = None
        own = self_signed(socket.getfqdn())
        self._context = _context_of(own)
        #: The context for the listening socket.
        self.context = _context_of(own)
        self.context.sni_callback = self._show_newest
        self._look()

    def follow(self) -> None:
        """Start a thread that looks for a newer certificate."""
        threading.Thread(target=self._follow, name="certificate", daemon=True).start()

    def _follow(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            self._look()

    def _look(self) -> None:
        try:
            found = self._web.certificate()
        except WorkerError as error:
            _LOG.warning("cannot look for the certificate now: %s", error)
            return
        if found is None or found == self._shown:
            return
        self._shown = found
        try:
            self._context = _context_of(found)
            _LOG.warning("the certificate of the management server is in use")
        except (ssl.SSLError, ValueError) as error:
            _LOG.error("the certificate of the management server is unusable: %s", error)

    def _show_newest(self, connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = self._context


def self_signed(name: str) -> WebCertificate:
    """Return a new certificate for that host, which no client trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_MAX_NAME])])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(encoding, form, serialization.NoEncryption()).decode()
    return WebCertificate(secret, certificate.public_bytes(encoding).decode())


def _context_of(certificate: WebCertificate) -> ssl.SSLContext:
    """Return a context with that certificate. Raise ssl.SSLError if the texts are no matching PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory(prefix="ssvm-certificate-") as name:  # the ssl module reads files only; mode 0700
        chain, key = Path(name, "chain"), Path(name, "key")
        chain.write_text(f"{certificate.certificate.strip()}\n{certificate.chain.strip()}\n")
        key.write_text(certificate.key)
        context.load_cert_chain(chain, key)
    return context
