"""Define the section ``[serve]``: the address, limits, keys and tokens of the HTTP service."""

from __future__ import annotations

from pydantic import Field, SecretStr

from .types import File, Name, Networks, Rate, Seconds, SecretFields, Section


class LinkKey(SecretFields):
    """A key that signs links."""

    #: At least 32 characters.
    secret: SecretStr = Field(min_length=32)


class ApiToken(SecretFields):
    """A token of the HTTP API. Its name appears in records as the user."""

    #: At least 32 characters.
    secret: SecretStr = Field(min_length=32)


class ServeSection(Section):
    """`ssvm serve`: downloads from directory stores and uploads, with signed links, and the HTTP API."""

    #: HOST:PORT. Use the certificate below, or a reverse proxy with TLS.
    listen: str = Field("127.0.0.1:8480", pattern=r"^.+:\d{1,5}$")
    #: The public URL, which links start with. Default: the address of the last start.
    url: str | None = Field(None, pattern=r"^https?://[^?#]+$")
    #: Keys that sign links, by name. Default: one key of this machine.
    keys: dict[Name, LinkKey] = Field(default_factory=dict)
    #: The name of the key for new links.
    key: str | None = None
    #: The maximum of connections. A further connection closes the oldest one without a signed request. If there is
    #: none, it gets 503.
    max_connections: int = Field(256, ge=1)
    #: The maximum of connections from one address (IPv6: one /64).
    max_per_address: int = Field(32, ge=1)
    #: Networks of reverse proxies. max_per_address does not apply to them, because they connect for many clients.
    trusted_proxies: Networks = ()
    #: The server disconnects a client that moves less than min_rate during so many seconds.
    stall_s: Seconds = 60.0
    #: The minimum rate in bytes a second of a client.
    min_rate: Rate = Field(1024, ge=1)
    #: Seconds that transfers get after SIGTERM.
    drain_s: Seconds = 60.0
    #: The certificate for TLS.
    certificate_file: File = None
    #: The private key of the certificate.
    private_key_file: File = None
    #: Also serve the HTTP API: docs/how-to/http-api.md. `ssvm serve --api` does so too.
    api: bool = False
    #: Tokens of the programs that may use the API, by name.
    tokens: dict[Name, ApiToken] = Field(default_factory=dict)
    #: Also serve what a CloudStack management server expects of a system VM: its download links, browser uploads and
    #: copies between zones. Needs the extra `cloudstack`.
    cloudstack: bool = False
    #: Use the certificate that the CloudStack management server sends to its agents. Until it has arrived, use a
    #: self-signed one. Needs cloudstack = true.
    certificate_from_cloudstack: bool = False
    #: Networks that may fetch objects for copies between zones, besides the addresses that the management server sends.
    copy_networks: Networks = ()
