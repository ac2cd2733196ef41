"""Read the settings of HTTP proxies. ``net.http`` sends absolute requests for http, and asks for a tunnel for https.

The proxy resolves names, so the address rule cannot check the address of a name. The rule checks the address of the
proxy, and URLs whose host is an address. The proxy's own configuration decides about all other hosts.
"""

from __future__ import annotations

import base64
import ipaddress
import socket
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from ssvm_worker.errors import ConfigError

from .address_policy import AddressRule
from .sockets import AddressRefused
from .urls import WebUrl, is_proxy_url


@dataclass(frozen=True)
class Proxy:
    """Proxy, and the hosts that are reached without it."""

    host: str
    port: int
    #: The value of Proxy-Authorization.
    authorization: str = field(default="", repr=False)
    #: Names (with all their subdomains), addresses and networks.
    bypassed: tuple[str, ...] = ()

    def serves(self, host: str) -> bool:
        """Return whether the host must be reached through the proxy."""
        return not any(_matches(host.lower(), each.lower().lstrip(".")) for each in self.bypassed)

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of each request to the proxy."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}


def parse_proxy(url: str, bypassed: tuple[str, ...] = ()) -> Proxy:
    """Parse ``http://[user:password@]host:port``. Raises ConfigError, whose text does not repeat the URL."""
    if not is_proxy_url(url):
        raise ConfigError("The value is not a proxy URL", "download.proxy", "Give http://host:port")
    parts = urlsplit(url)
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    authorization = f"Basic {base64.b64encode(pair.encode()).decode()}" if parts.username else ""
    return Proxy(parts.hostname or "", parts.port or 3128, authorization, bypassed)


def refuse_address(url: WebUrl, rule: AddressRule | None) -> None:
    """Raise AddressRefused if the host is a forbidden address, in any notation."""
    if rule is None:
        return
    if url.host.lower().rstrip(".").rpartition(".")[2] == "localhost":
        raise AddressRefused(f"{url.host} is a loopback address")
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return  # the host is a name
    if reason := rule.refuse(str(found[0][4][0])):
        raise AddressRefused(f"{url.host} is {reason}")


def _matches(host: str, pattern: str) -> bool:
    if pattern == "*" or host == pattern or host.endswith(f".{pattern}"):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(pattern)
    except ValueError:
        return False
