"""Where a vCenter or ESXi host is, and how it is known to be the right one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .trust import parse_thumbprint


@dataclass(frozen=True)
class Address:
    """A vCenter or ESXi host and a login."""

    host: str
    username: str
    password: str = field(repr=False)
    port: int = 443
    #: PEM of the authority, or of the certificate itself.
    ca_file: Path | None = None
    #: SHA-1 or SHA-256 of the certificate, which then needs no authority.
    thumbprint: str | None = None
    #: Seconds for one API call, and for a silent data stream.
    timeout_s: float = 120.0

    @property
    def name(self) -> str:
        """Safe to log."""
        return self.host if self.port == 443 else f"{self.host}:{self.port}"

    @property
    def pin(self) -> str | None:
        """The thumbprint, normalised; ConfigError if it is none."""
        return parse_thumbprint(self.thumbprint, self.name) if self.thumbprint else None
