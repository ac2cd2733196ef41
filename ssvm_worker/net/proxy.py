"""Use HTTP proxies: absolute requests for http, a CONNECT tunnel for https.

The proxy resolves names, so the address rule cannot check the address of a name. The rule checks the address of the
proxy, and URLs whose host is an address. The proxy's own configuration decides about all other hosts.
"""

from __future__ import annotations

import base64
import ipaddress
import socket
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from ssvm_worker.errors import ConfigError, SourceDenied, SourceUnavailable

from .address_policy import AddressRule
from .http_response import HttpAnswer
from .sockets import AddressRefused, WatchedSocket
from .urls import WebUrl


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
    try:
        parts = urlsplit(url)
        port = parts.port or 3128
    except ValueError as error:
        raise ConfigError("The value is not a proxy URL", "download.proxy", "Give http://host:port") from error
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ConfigError("The value is not a proxy URL", "download.proxy", "Give http://host:port")
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    authorization = f"Basic {base64.b64encode(pair.encode()).decode()}" if parts.username else ""
    return Proxy(parts.hostname, port, authorization, bypassed)


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


def tunnel(sock: WatchedSocket, url: WebUrl, proxy: Proxy) -> None:
    """Ask the proxy on *sock* for a tunnel to the host of *url*.

    Raises SourceDenied, SourceUnavailable, and the errors of the socket.
    """
    host = f"[{url.host}]" if ":" in url.host else url.host
    lines = [f"CONNECT {host}:{url.port} HTTP/1.1", f"Host: {host}:{url.port}"]
    lines += [f"{name}: {value}" for name, value in proxy.headers.items()]
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("ascii"))
    answer = HttpAnswer(sock, method="CONNECT")
    answer.begin()
    answer.close()
    if answer.status in (403, 407):
        what = f"The proxy {proxy.host} refused the connection (status {answer.status})"
        raise SourceDenied(what, url.name, "Check download.proxy, and the rules of the proxy")
    if not 200 <= answer.status < 300:
        what = f"The proxy {proxy.host} did not connect (status {answer.status})"
        raise SourceUnavailable(what, url.name, "Check the log of the proxy")


def _matches(host: str, pattern: str) -> bool:
    if pattern == "*" or host == pattern or host.endswith(f".{pattern}"):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(pattern)
    except ValueError:
        return False
