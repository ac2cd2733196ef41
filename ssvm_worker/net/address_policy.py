"""Decide which IP addresses the worker may connect to. Standard library only."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from ssvm_worker.errors import ConfigError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Networks of IANA's special-purpose registries (RFC 6890 and updates), and some that they do not list. ``is_global``
#: is not enough: it is True for NAT64, 6to4, site-local and multicast addresses.
_RESERVED: tuple[tuple[_Network, str], ...] = tuple(
    (ipaddress.ip_network(network), reason)
    for network, reason in (
        ("0.0.0.0/8", "an unspecified address"),
        ("10.0.0.0/8", "a private address"),
        ("100.64.0.0/10", "a carrier-grade NAT address"),
        ("127.0.0.0/8", "a loopback address"),
        ("169.254.0.0/16", "a link-local (cloud metadata) address"),
        ("172.16.0.0/12", "a private address"),
        ("192.88.99.0/24", "a 6to4 relay address"),
        ("192.168.0.0/16", "a private address"),
        ("224.0.0.0/4", "a multicast address"),
        ("240.0.0.0/4", "a reserved address"),
        ("::/128", "an unspecified address"),
        ("::1/128", "a loopback address"),
        ("64:ff9b:1::/48", "a local NAT64 address"),
        ("2001::/32", "a Teredo address"),
        ("2002::/16", "a 6to4 address"),
        ("fc00::/7", "a private (unique local) address"),
        ("fe80::/10", "a link-local address"),
        ("fec0::/10", "a site-local address"),
        ("ff00::/8", "a multicast address"),
    )
)
#: Metadata services of clouds. IPv4: EC2 and most others, ECS tasks, Azure, Alibaba, Oracle. IPv6: EC2 and GCE. They
#: give credentials to every client, so no setting allows them.
_METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "168.63.129.16", "100.100.100.200", "192.0.0.192"),
        *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"),
    )
)
#: All addresses that IANA has assigned as global unicast so far (RFC 4291, section 2.4).
_UNICAST6 = ipaddress.IPv6Network("2000::/3")
#: The well-known prefix of NAT64 (RFC 6052). The last 32 bits are the IPv4 address of the peer.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class AddressRule:
    """Rule that allows public addresses and the listed networks (CIDR), but never a metadata service of a cloud.

    Raises ConfigError if an item is not a network.
    """

    allow_networks: tuple[str, ...] = ()
    _allowed: tuple[_Network, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_allowed", tuple(_network(each) for each in self.allow_networks))

    def refuse(self, address: str) -> str | None:
        """Return why a connection to this IP address is forbidden, or None if it is allowed.

        The reason is a phrase that can follow the word "is".
        """
        ip = _embedded(ipaddress.ip_address(address.partition("%")[0]))
        if ip in _METADATA:
            return "a cloud metadata address"
        if any(ip in network for network in self._allowed):
            return None
        for network, reason in _RESERVED:
            if ip in network:
                return reason
        if not ip.is_global or (ip.version == 6 and ip not in _UNICAST6):
            return "not a public address"
        return None


def _network(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        remedy = "Give networks such as 10.20.0.0/16 or fd00:20::/64"
        raise ConfigError(f"Not a network: {error}", "allow_networks", remedy) from error


def _embedded(ip: _Address) -> _Address:
    """Return the IPv4 address inside a v4-mapped or NAT64 address, else the address itself."""
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip in _NAT64):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip
