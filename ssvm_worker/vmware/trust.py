"""Whom we believe to be a vCenter or an ESXi host: an authority vouches for it, or its certificate is pinned."""

from __future__ import annotations

import hashlib
import hmac
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssvm_worker.errors import ConfigError
from ssvm_worker.net.sockets import TICK, StallWatch, send_all, tls_context

#: The algorithms of a thumbprint, by the length of its hex form: vSphere writes SHA-1, newer tools SHA-256.
_ALGORITHMS = {40: "sha1", 64: "sha256"}


class PinMismatch(ssl.SSLError):
    """The peer showed another certificate than the one that is pinned."""


def parse_thumbprint(text: str, where: str) -> str:
    """Lower-case hex of a SHA-1 or SHA-256 thumbprint, with or without colons; ConfigError for anything else."""
    value = text.replace(":", "").strip().lower()
    if len(value) not in _ALGORITHMS or not re.fullmatch("[0-9a-f]+", value):
        raise ConfigError("This is no SHA-1 or SHA-256 thumbprint", where, "Give 40 or 64 hex digits, colons or not")
    return value


def thumbprint(der: bytes, length: int = 64) -> str:
    """The thumbprint of a certificate, of that many hex digits."""
    return hashlib.new(_ALGORITHMS[length], der, usedforsecurity=False).hexdigest()


def thumbprint_of(pem: str) -> str:
    """The SHA-256 thumbprint of a certificate in PEM; empty if it is none."""
    try:
        return thumbprint(ssl.PEM_cert_to_DER_cert(pem))
    except ValueError:
        return ""


def refuse_other(der: bytes | None, pin: str) -> None:
    """Raise PinMismatch unless the certificate has that thumbprint."""
    if der is None or not hmac.compare_digest(thumbprint(der, len(pin)), pin):
        shown = thumbprint(der, len(pin)) if der else "none"
        raise PinMismatch(f"the certificate's thumbprint is {shown}, not {pin}")


def context_for(ca_file: Path | str | None, pin: str | None) -> ssl.SSLContext:
    """A client context that believes *ca_file*, else the system's authorities.

    With a pin it believes anybody, so that ``refuse_other`` must follow the handshake. ConfigError for a bad file.
    """
    if not pin and not ca_file:
        return tls_context()
    # The system's authorities are left out: they are not asked, and take 50 ms to load.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if pin:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    try:
        context.load_verify_locations(ca_file)
    except OSError as error:
        raise ConfigError(
            f"No certificates can be read: {error}", str(ca_file), "Give a PEM file as ca_file"
        ) from error
    return context


class _ApiSocket(ssl.SSLSocket):
    """A TLS socket under a watch, as http.client makes it by itself; ``watch`` is set before the first byte."""

    watch: StallWatch

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:  # noqa: ARG002 - TLS has none
        view = memoryview(buffer).cast("B")[: nbytes or None]
        return self.watch.wait(lambda: self.read(len(view), view))  # type: ignore[arg-type, return-value]

    def sendall(self, data: Any, flags: int = 0) -> None:  # noqa: ARG002
        send_all(super().send, data, self.watch)

    def do_handshake(self, block: bool = False) -> None:
        started = time.monotonic()
        while True:
            try:
                return super().do_handshake(block)
            except TimeoutError:
                self.watch.check()
                if time.monotonic() - started > self.watch.stall_s:
                    raise


def api_context(ca_file: Path | None, pin: str | None, check: Callable[[], None], stall_s: float) -> ssl.SSLContext:
    """A context for pyVmomi: every socket made with it looks at the pin, gives up after stall_s and hears a cancel.

    pyVmomi looks at a thumbprint when it makes a connection, but not when http.client opens it again.
    """

    class ApiSocket(_ApiSocket):
        def do_handshake(self, block: bool = False) -> None:
            self.settimeout(TICK)
            # A long poll is silent for long, so only silence is a stall, not a low rate.
            self.watch = StallWatch(check, stall_s, min_rate=0)
            super().do_handshake(block)
            if pin:
                refuse_other(self.getpeercert(binary_form=True), pin)

    context = context_for(ca_file, pin)
    context.sslsocket_class = ApiSocket
    return context


def reason(error: ssl.SSLError) -> str:
    """Why a certificate was refused, in words."""
    found: Any = getattr(error, "verify_message", None)
    return str(found or (error.args[-1] if error.args else error))
