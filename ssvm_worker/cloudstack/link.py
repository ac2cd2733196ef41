"""Connect to a management server through TCP, TLS 1.2 and CloudStack's own records around TLS (its class Link).

The handshake is plain TLS. After it, each TLS record has a header of 4 bytes: its length in 16 bits, and the bit
FOLLOWING if the next record belongs to the same message. So Python's SSLSocket cannot be used. TLS 1.3 cannot be used
either, because the server then sends session tickets without such a header.

The server shows the certificate of its authority. OpenSSL refuses the key usage of that certificate for a server.
So the certificate is compared with the expected ones instead, before the first message is sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import re
import socket
import ssl
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.errors import Retryable
from ssvm_worker.units import KiB

from .frame import HEADER, MAX_JSON

#: A message may have more records (Link.HEADER_FLAG_FOLLOWING).
FOLLOWING = 0x00010000
#: The longest record that Java's reader accepts, in bytes, and the plain bytes that we put into one.
MAX_RECORD, _PLAIN = 18_000, 16_000
#: The maximum of bytes of one message.
_MAX_MESSAGE = HEADER.size + MAX_JSON
_RECORD = struct.Struct(">I")
#: The most bytes of one read. A hundred commands may arrive at once, and each read costs more than the parsing.
_RECEIVE = 64 * KiB
#: The bytes after which a write begins, although more messages follow.
_SEND = 64 * KiB
#: Seconds that a write may wait for the server to read. The kernel then gives up unconfirmed data as well. A shorter
#: interruption of the network must not end a connection: the server may block the host then.
_SEND_S = 120.0
#: No RSA key exchange, because it lacks forward secrecy. Every Java since 8 has the others.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:ECDHE+AES:DHE+AES"
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.S)


class LinkLost(Retryable):
    """The connection to a management server could not be made, or has ended."""


@dataclass(frozen=True)
class LinkTrust:
    """How the two sides know each other. The files are read for each connection, so that renewed ones take effect."""

    #: A PEM file with all certificates of which the server must show one.
    ca_file: Path | None = None
    #: ``sha256:`` and the digest of the certificate that the server must show.
    fingerprint: str | None = None
    #: The certificate and the key of this agent.
    certificate_file: Path | None = None
    key_file: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Return the settings of TLS. Raise LinkLost if a file is unreadable now, because it may be written later."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # ``check`` verifies
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(_CIPHERS)
        if self.certificate_file and self.certificate_file.exists():
            try:
                context.load_cert_chain(self.certificate_file, self.key_file)
            except OSError as error:  # ssl.SSLError is one
                what = f"The agent's certificate or key cannot be used: {error.strerror or error}"
                raise LinkLost(what, str(self.certificate_file), "Give a PEM certificate and its key") from error
        return context

    def check(self, shown: bytes) -> None:
        """Raise LinkLost unless the server's certificate, in DER, is an expected one."""
        if self.ca_file is None and self.fingerprint is None:
            return
        digest = fingerprint_of(shown)
        expected = [self.fingerprint] if self.fingerprint else [fingerprint_of(each) for each in self.authorities()]
        if not any(hmac.compare_digest(digest, each) for each in expected if each):
            raise LinkLost(
                f"The server's certificate has the fingerprint {digest}, which is not expected",
                str(self.ca_file or self.fingerprint),
                "If the server has a new authority, update ca_file or fingerprint in [cloudstack]",
            )

    def authorities(self) -> list[bytes]:
        """Return the certificates of *ca_file* in DER. Raise LinkLost if the file has none, or is unreadable now."""
        assert self.ca_file
        try:
            found = [
                ssl.PEM_cert_to_DER_cert(each) for each in _PEM.findall(self.ca_file.read_text("ascii", "replace"))
            ]
        except OSError as error:
            what = f"The certificate of the server's authority cannot be read: {error.strerror}"
            raise LinkLost(what, str(self.ca_file), "The management server writes it into a system VM") from error
        except ValueError as error:
            raise LinkLost(f"The file contains a damaged certificate: {error}", str(self.ca_file)) from error
        if not found:
            raise LinkLost("The file contains no certificate", str(self.ca_file), "Give PEM certificates")
        return found


def fingerprint_of(certificate: bytes) -> str:
    """Return the fingerprint of a certificate in DER: ``sha256:`` and 64 digits."""
    return f"sha256:{hashlib.sha256(certificate).hexdigest()}"


class AgentLink:
    """A connection to a server. Several threads may ``send``, and one ``receive``. Any thread may ``close``."""

    def __init__(self, host: str, port: int, trust: LinkTrust, *, timeout_s: float = 20.0) -> None:
        """Connect and do the handshake within *timeout_s* each. Raise LinkLost."""
        self.host, self.port = host, port
        self.peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        context = trust.context()
        try:
            self._socket = socket.create_connection((host, port), timeout_s)
        except (OSError, UnicodeError) as error:
            what = f"Cannot connect to the management server: {getattr(error, 'strerror', None) or error}"
            raise LinkLost(what, self.peer, "Check the address, the port and the firewalls") from error
        #: The address of this host, as the server sees it if there is no translation.
        self.local_address: str = self._socket.getsockname()[0]
        #: Bytes from the socket that no call of ``_read`` has returned yet.
        self._received = bytearray()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)
        self._sending, self._crypt = threading.Lock(), threading.Lock()
        self._why = ""
        self._moved_at = time.monotonic()
        try:
            self._handshake(timeout_s, bool(trust.certificate_file and trust.certificate_file.exists()))
            trust.check(self._tls.getpeercert(binary_form=True) or b"")
            self._set_options()
        except BaseException:
            self.close()
            raise

    @property
    def quiet_s(self) -> float:
        """Return the seconds since the last byte from the server."""
        return time.monotonic() - self._moved_at

    @property
    def cipher(self) -> str:
        """Return the version of TLS and the cipher, for the log."""
        cipher = self._tls.cipher()
        return f"{self._tls.version()} {cipher[0] if cipher else ''}"

    def send(self, *messages: bytes) -> None:
        """Send messages, short ones with one write.

        Raise LinkLost, also if the server reads nothing for two minutes.
        """
        with self._sending:
            waiting = bytearray()
            for data in messages:
                for start in range(0, len(data), _PLAIN):
                    with self._crypt:
                        self._tls.write(data[start : start + _PLAIN])
                        record = self._outgoing.read()
                    following = FOLLOWING if start + _PLAIN < len(data) else 0
                    waiting += _RECORD.pack(len(record) | following) + record
                    if len(waiting) >= _SEND:
                        self._write(waiting)
                        waiting = bytearray()
            self._write(waiting)

    def _write(self, data: bytearray) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            # A part of a record may be sent, so nothing can follow.
            lost = self._lost(f"Sending to the management server failed: {error.strerror}")
            self.close(lost.what)
            raise lost from error

    def receive(self) -> bytes:
        """Wait for a message and return it. Raise LinkLost at the end of the connection."""
        data, following = bytearray(), True
        while following:
            (header,) = _RECORD.unpack(self._read(_RECORD.size))
            length, following = header & 0xFFFF, bool(header & FOLLOWING)
            if not 0 < length <= MAX_RECORD or header & ~(0xFFFF | FOLLOWING):
                raise self._lost(f"The management server sent a record with the invalid header {header:#010x}")
            data += self._decrypted(self._read(length))
            if len(data) > _MAX_MESSAGE:
                raise self._lost(f"The management server sent a message of more than {_MAX_MESSAGE} bytes")
        return bytes(data)

    def close(self, why: str = "") -> None:
        """End the connection. Calls of other threads then raise LinkLost. Java sends no close_notify either."""
        self._why = self._why or why
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _set_options(self) -> None:
        """Let the kernel notice a dead server, and send small messages at once."""
        self._socket.settimeout(None)
        seconds = int(_SEND_S)
        for level, name, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, 0)),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds),
        ):
            self._socket.setsockopt(level, name, value)

    def _handshake(self, timeout_s: float, has_certificate: bool) -> None:
        """Do the TLS handshake. It takes one record at a time, because records with a header may follow."""
        until = time.monotonic() + timeout_s
        advice = (
            "A server with ca.plugin.root.auth.strictness wants a certificate from its authority for the address "
            f"{self.local_address}. Check certificate_file and key_file, and both clocks"
        )
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    return self._socket.sendall(self._outgoing.read())
                except ssl.SSLWantReadError:
                    self._socket.sendall(self._outgoing.read())
                head = self._read(5, until)
                self._incoming.write(head + self._read(int.from_bytes(head[3:5], "big"), until))
        except (OSError, LinkLost) as error:  # ssl.SSLError is an OSError
            ours = "with" if has_certificate else "without"
            why = (
                getattr(error, "reason", None) or getattr(error, "strerror", None) or getattr(error, "what", str(error))
            )
            what = f"The TLS handshake {ours} a certificate of the agent failed: {str(why).lower().replace('_', ' ')}"
            raise LinkLost(what, self.peer, advice) from error

    def _decrypted(self, record: bytes) -> bytes:
        """Return the plain bytes of one or more complete TLS records."""
        data = bytearray()
        try:
            with self._crypt:
                self._incoming.write(record)
                while piece := self._tls.read(1 << 16):
                    data += piece
        except ssl.SSLWantReadError:
            return bytes(data)
        except ssl.SSLError as error:
            raise self._lost(f"The management server sent damaged TLS data: {error.reason or error}") from error
        raise self._lost("The management server has ended TLS")

    def _read(self, length: int, until: float = math.inf) -> bytes:
        while len(self._received) < length:
            if time.monotonic() > until:
                raise self._lost("no answer in time")
            try:
                piece = self._socket.recv(_RECEIVE)
            except OSError as error:
                raise self._lost(f"The connection has failed: {error.strerror or error}") from error
            if not piece:
                raise self._lost("The management server has closed the connection")
            self._received += piece
            self._moved_at = time.monotonic()
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    def _lost(self, what: str) -> LinkLost:
        """Return the error. If we have closed the connection, it has our reason."""
        return LinkLost(self._why or what, self.peer)
