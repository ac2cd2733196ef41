"""The address of a vCenter or ESXi host. Checks of its certificate: by an authority or by a pinned thumbprint."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssvm_worker.config.schema import VCenterSection
from ssvm_worker.net.sockets import TICK, StallWatch, send_all
from ssvm_worker.net.tls import context_for, parse_thumbprint, require_pin


@dataclass(frozen=True)
class Address:
    """Address and login of a vCenter or ESXi host."""

    host: str
    username: str
    password: str = field(repr=False)
    port: int = 443
    #: A PEM file with the certificate of the authority, or with the server's own certificate.
    ca_file: Path | None = None
    #: SHA-1 or SHA-256 thumbprint of the server's certificate. With a thumbprint, no authority is necessary.
    thumbprint: str | None = None
    #: Seconds without an answer to an API call.
    timeout_s: float = VCenterSection.model_fields["timeout_s"].default
    #: Seconds without data in a stream. A healthy host is silent while it reads a long empty area of a disk.
    stream_timeout_s: float = VCenterSection.model_fields["stream_timeout_s"].default
    #: The address, with an optional port, to use for an ESXi host instead of its name in vCenter.
    hosts: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return host and port, safe to log."""
        return self.host if self.port == 443 else f"{self.host}:{self.port}"

    @property
    def pin(self) -> str | None:
        """Return the normalised thumbprint, or None. Raises ConfigError for an invalid one."""
        return parse_thumbprint(self.thumbprint, self.name) if self.thumbprint else None


class _ApiSocket(ssl.SSLSocket):
    """A TLS socket that http.client creates and a StallWatch supervises. ``watch`` must be set before the handshake."""

    watch: StallWatch

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:  # noqa: ARG002 - TLS has no flags
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
    """Return a context for pyVmomi whose sockets check the pin, time out after *stall_s* and react to cancellation.

    pyVmomi itself checks a thumbprint for a new connection only. It does not when http.client reconnects.
    """

    class ApiSocket(_ApiSocket):
        def do_handshake(self, block: bool = False) -> None:
            self.settimeout(TICK)
            # A long poll transfers nothing for a long time: only a timeout is a stall, not a low rate.
            self.watch = StallWatch(check, stall_s, min_rate=0)
            super().do_handshake(block)
            if pin:
                require_pin(self.getpeercert(binary_form=True), pin)

    context = context_for(ca_file, pin)
    context.sslsocket_class = ApiSocket
    return context


def failure_reason(error: ssl.SSLError) -> str:
    """Return the reason why a certificate was rejected."""
    message: Any = getattr(error, "verify_message", None)
    return str(message or (error.args[-1] if error.args else error))
