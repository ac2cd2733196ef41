"""Define the section ``[cloudstack]``: how `ssvm agent` reaches a management server, and what it says about itself."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .types import Address, Directory, File, Seconds, Section, split


def _server(value: tuple[str, ...]) -> tuple[str, ...]:
    for each in value:
        if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*", each):
            raise ValueError(f"{each!r} is not a host. Give names or addresses. The key port has the port")
    return value


def _fingerprint(value: str | None) -> str | None:
    """Return the fingerprint as ``sha256:`` and 64 lower-case digits. Colons between bytes are optional."""
    if value is None:
        return None
    algorithm, _, text = value.strip().lower().partition(":")
    digits = text.replace(":", "")
    if algorithm != "sha256" or not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("must be sha256: and 64 hex digits. Colons between bytes are optional")
    return f"sha256:{digits}"


class HostAddress(Section):
    """One network interface of this host, as the management server stores it."""

    #: The address. Default for the private network: the address that connects to the server. Default for the others:
    #: the private address.
    address: Address | None = None
    #: The netmask.
    netmask: str | None = Field(None, pattern=r"^[0-9.]+$")
    #: The MAC address.
    mac: str | None = Field(None, pattern=r"^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$")


class CloudStackSection(Section):
    """`ssvm agent`: the secondary storage agent for a CloudStack management server.

    With servers, exactly one of ca_file, fingerprint and insecure is required.
    """

    #: Management servers: names or addresses. The server may replace the list later.
    servers: Annotated[tuple[str, ...], BeforeValidator(split), AfterValidator(_server)] = ()
    #: The port of all servers.
    port: int = Field(8250, ge=1, le=65535)
    #: The server to start with. static: the first. roundrobin: by the number in the name. shuffle: a random one. If a
    #: server fails, the agent tries the next one. The server may replace list and order later.
    algorithm: Literal["static", "roundrobin", "shuffle"] = "static"
    #: Seconds between two attempts to connect, increased by a random part of up to half.
    backoff_s: Seconds = 5.0
    #: The identity of the host. The agent appends -NfsSecondaryStorageResource. Default: name.
    guid: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    #: The name of the host. The server sends the setup commands only if it is the name of a system VM, such as s-7-VM.
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    #: The id or name of the zone in CloudStack. Default: the zone of the worker.
    zone: str | None = None
    #: The id or name of the pod in CloudStack.
    pod: str | None = None
    #: The version that the server stores for this host. It does not compare it.
    version: str = "4.23.0.0"
    #: The management network.
    private: HostAddress = HostAddress()
    #: The network of download links.
    public: HostAddress = HostAddress()
    #: The network of the image stores.
    storage: HostAddress = HostAddress()
    #: The router of the public network.
    gateway: Address | None = None
    #: Certificates of which the server must show one (cloud.ca.crt).
    ca_file: File = None
    #: sha256:HEX, the digest of the certificate that the server must show.
    fingerprint: Annotated[str | None, AfterValidator(_fingerprint)] = None
    #: Accept every server. It can read the secrets of all image stores, so use this for experiments only.
    insecure: bool = False
    #: The certificate of this agent (cloud.crt). A server with ca.plugin.root.auth.strictness requires it.
    certificate_file: File = None
    #: The private key of the certificate (cloud.key).
    key_file: File = None
    #: Image stores that the server may name and the worker may use: patterns with ``*``, such as nfs://10.0.0.*/*.
    allow_stores: Annotated[tuple[str, ...], BeforeValidator(split)] = ("nfs://*", "s3://*")
    #: By URL of the server, nfs://HOST/EXPORT or s3://ENDPOINT/BUCKET: the name of a configured image store to use for
    #: it. Give that store shared = true if hypervisors read it.
    stores: dict[str, str] = Field(default_factory=dict)
    #: Seconds until a download link ends, unless the server deletes it before. Use more than the server's
    #: extract.url.expiration.interval and extract.url.cleanup.interval together.
    link_s: Seconds = 24 * 3600.0
    #: The root of a web server on this host, such as /var/www/html. The agent makes links there, as the Java agent does
    #: for Apache. Default: only `ssvm serve` answers.
    web_root: Directory = None
    #: The program of a system VM that installs the certificate of Apache:
    #: /usr/local/cloud/systemvm/config_ssl.sh. The agent runs it when the server sends a new certificate.
    certificate_script: File = None
    #: The maximum of concurrent commands. Each occupies a thread until its answer. Further commands wait.
    max_commands: int = Field(128, ge=8)

    @model_validator(mode="after")
    def _is_complete(self) -> CloudStackSection:
        trust = [name for name in ("ca_file", "fingerprint", "insecure") if getattr(self, name) not in (None, False)]
        if self.servers and len(trust) != 1:
            raise ValueError(
                f"servers need exactly one of ca_file, fingerprint and insecure. Given: {', '.join(trust) or 'none'}"
            )
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file belong together. Give both or none")
        if self.servers and not self.name:
            raise ValueError('servers need name, for example name = "s-7-VM"')
        return self
