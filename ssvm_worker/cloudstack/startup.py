"""Describe this host for a management server: StartupSecondaryStorageCommand as the Java agent sends it."""

from __future__ import annotations

import contextlib
import fcntl
import platform
import socket
import struct
from pathlib import Path
from typing import Any

from ssvm_worker.config.cloudstack_section import CloudStackSection, HostAddress

from .frame import RawMessage

_CLASS = "com.cloud.agent.api.StartupSecondaryStorageCommand"
#: The resource of the Java agent. The server finds the host by its GUID with and without this suffix.
RESOURCE = "NfsSecondaryStorageResource"
#: The processors that every release from 4.20 on knows. It fails on others, and assumes x86_64 without a value.
_ARCHITECTURES = ("x86_64", "aarch64")
#: netdevice(7): the request has the name of the interface in 16 bytes, then an address.
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B


def startup_command(section: CloudStackSection, zone: str, local_address: str) -> RawMessage:
    """Return the command without the fields that change: id, msHostList and connectionTransferred.

    *local_address*: the address of this host that is connected to the server. It replaces missing addresses, because
    the server stores an address for each host.
    """
    private = _complete(section.private, local_address)
    fields: dict[str, Any] = {
        "type": "SecondaryStorage",
        "dataCenter": section.zone or zone,
        "pod": section.pod,
        "guid": f"{section.guid or section.name}-{RESOURCE}",
        "name": section.name,
        "version": section.version,
        "iqn": "NoIqn",
    }
    for network, given in (("public", section.public), ("private", private), ("storage", section.storage)):
        found = _complete(given, private.address or local_address)
        fields[f"{network}IpAddress"] = found.address
        fields[f"{network}Netmask"] = found.netmask
        fields[f"{network}MacAddress"] = found.mac
    architecture = platform.machine()
    fields |= {
        "gatewayIpAddress": section.gateway,
        "resourceName": RESOURCE,
        "arch": architecture if architecture in _ARCHITECTURES else None,
    }
    return RawMessage(_CLASS, {name: value for name, value in fields.items() if value is not None}).completed()


def _complete(given: HostAddress, address: str) -> HostAddress:
    """Return the address with the netmask and the MAC address of its interface, if they were not given."""
    address = given.address or address
    netmask, mac = _interface_of(address)
    return HostAddress(address=address, netmask=given.netmask or netmask, mac=given.mac or mac)


def _interface_of(address: str) -> tuple[str | None, str | None]:
    """Return netmask and MAC address of the interface with this IPv4 address, or None where they are unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                if _ask(probe, name, _SIOCGIFADDR) == address:
                    mac = Path(f"/sys/class/net/{name}/address").read_text().strip()
                    return _ask(probe, name, _SIOCGIFNETMASK), mac or None
    return None, None


def _ask(probe: socket.socket, interface: str, request: int) -> str:
    answer = fcntl.ioctl(probe, request, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])
