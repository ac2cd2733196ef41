"""The storage network: check that the host reaches an NFS server from the source address of the settings.

The kernel's NFS client takes its source address from the route. No mount option can change the address.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssvm_worker.errors import ConfigError, StoreUnavailable

#: Runs a command as root. Returns the reason of a failure, or an empty text.
Run = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class NetworkPath:
    """The source address of this host, and the gateway to other networks. None: an administrator sets the routes."""

    source: str | None = None
    gateway: str | None = None

    def ensure(self, host: str, port: int, run: Run) -> None:
        """Check that the host reaches the server from the source address. With a gateway, set a route if necessary.

        Raises ConfigError, StoreUnavailable.
        """
        if self.source is None:
            return
        # mount.nfs may use each of these addresses.
        for address in _addresses(host, port, self.source):
            if not self.wrong_source(address, port):
                continue
            if self.gateway is None:
                raise self._refusal(address, port)
            command = ["ip", "route", "replace", address, "via", self.gateway, "src", self.source]
            if failure := run(command):
                what = f"The route to {address} cannot be set: {failure}"
                raise ConfigError(what, "nfs.gateway", f"Run this command by hand: {' '.join(command)}")
            if self.wrong_source(address, port):
                raise self._refusal(address, port)

    def wrong_source(self, address: str, port: int) -> str:
        """Return a text about the wrong source address of the route. If the route is right, the text is empty."""
        found = source_address_for(address, port)
        is_right = self.source in (None, found)
        return "" if is_right else f"is reached from {found or 'nowhere'}, not from nfs.source_address {self.source}"

    def _refusal(self, address: str, port: int) -> ConfigError:
        return ConfigError(
            f"{address} {self.wrong_source(address, port)}",
            "nfs.source_address",
            f"Set nfs.gateway, or a route: ip route add {address} via ROUTER src {self.source}",
        )


def source_address_for(address: str, port: int) -> str | None:
    """Return the source address that the kernel would use for an address. None: no route. Sends no packet."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _addresses(host: str, port: int, source: str) -> list[str]:
    """Return the server's addresses of the same family as the source address."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        what = f"No address found for the server: {error.strerror}"
        raise StoreUnavailable(what, host, "Check the name service") from error
    return sorted({str(each[4][0]) for each in found})
