"""The storage network: that an NFS server is reached from the address which the settings give us there.

The kernel's client takes the source that the route says; no mount option changes that.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssvm_worker.errors import ConfigError, StoreUnavailable

#: Runs a command as root; what it says of its failure, empty if there is none.
Run = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class NetworkPath:
    """Ours, and the router on the way to servers in other networks; None where the routes are an administrator's."""

    source: str | None = None
    gateway: str | None = None

    def see_to(self, host: str, port: int, run: Run) -> None:
        """Return when that server is reached from our address, with a route that is made if we have a gateway.

        Raises ConfigError, StoreUnavailable.
        """
        if self.source is None:
            return
        for address in _addresses(host, port, self.source):
            if not self.astray(address, port):
                continue
            if self.gateway is None:
                raise self._refusal(address, port)
            command = ["ip", "route", "replace", address, "via", self.gateway, "src", self.source]
            if wrong := run(command):
                raise ConfigError(f"The route to {address} cannot be made: {wrong}", "nfs.gateway", " ".join(command))
            if self.astray(address, port):
                raise self._refusal(address, port)

    def astray(self, address: str, port: int) -> str:
        """From where it is reached in place of our address; empty if that is as it should be."""
        found = source_to(address, port)
        is_right = self.source in (None, found)
        return "" if is_right else f"is reached from {found or 'nowhere'}, not from nfs.source_address {self.source}"

    def _refusal(self, address: str, port: int) -> ConfigError:
        return ConfigError(
            f"{address} {self.astray(address, port)}",
            "nfs.source_address",
            f"Set nfs.gateway, or a route: ip route add {address} via ROUTER src {self.source}",
        )


def source_to(address: str, port: int) -> str | None:
    """The address of ours from which the kernel would reach that one; None without a route. Sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _addresses(host: str, port: int, source: str) -> list[str]:
    """Those of our address' family, by which mount.nfs may reach it."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise StoreUnavailable(
            f"No address of the server: {error.strerror}", host, "Look at the name service"
        ) from error
    return sorted({str(each[4][0]) for each in found})
