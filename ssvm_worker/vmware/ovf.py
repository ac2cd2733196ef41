"""OVF 1.0 descriptors (DMTF DSP0243): build a minimal one, check a server's one, and write the checksum file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as Xml

from .hardware import Controller, Disk, Hardware, family

_OVF = "http://schemas.dmtf.org/ovf/envelope/1"
_RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
_VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
_VMW = "http://www.vmware.com/schema/ovf"
#: The format URI that VMware's tools write and require.
_FORMAT = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
for _prefix, _uri in (("ovf", _OVF), ("rasd", _RASD), ("vssd", _VSSD), ("vmw", _VMW)):
    Xml.register_namespace(_prefix, _uri)
_HEAD = b'<?xml version="1.0" encoding="UTF-8"?>\n'
#: ResourceType of CIM_ResourceAllocationSettingData.
_CPU, _MEMORY, _NETWORK, _DISK, _VIDEO_CARD = 3, 4, 10, 17, 24
#: ResourceType of a controller, by its family.
_CONTROLLERS = {"ide": 5, "scsi": 6, "sata": 20, "nvme": 20}
#: ResourceSubType of a controller, by its class in the API.
_SUBTYPES = {
    "ParaVirtualSCSIController": "VirtualSCSI",
    "VirtualLsiLogicController": "lsilogic",
    "VirtualLsiLogicSASController": "lsilogicsas",
    "VirtualBusLogicController": "buslogic",
    "VirtualAHCIController": "vmware.sata.ahci",
    "VirtualNVMEController": "vmware.nvme.controller",
}


@dataclass(frozen=True)
class OvfDisk:
    """A stored disk."""

    disk: Disk
    #: The file name in the descriptor.
    name: str
    #: Bytes of the file, as the worker counted them.
    size: int
    #: Bytes of the disk that contain data.
    populated: int
    #: The device key in the lease.
    lease_key: str


@dataclass(frozen=True)
class OvfFile:
    """A stored file that is no disk: the firmware's variables (nvram)."""

    name: str
    #: Bytes.
    size: int
    #: The key of the file in the lease.
    lease_key: str


def build(hardware: Hardware, disks: Sequence[OvfDisk], other_files: Sequence[OvfFile] = ()) -> bytes:
    """Return a descriptor of the VM with exactly these disks and, if present, its nvram."""
    envelope = Xml.Element(_q("Envelope"))
    references = _add(envelope, "References")
    section = _add(envelope, "DiskSection", Info="Virtual disks")
    networks = _add(envelope, "NetworkSection", Info="Networks")
    for number, each in enumerate(disks):
        _add(references, "File", attributes={"id": f"file{number}", "href": each.name, "size": str(each.size)})
        disk = {
            "diskId": f"vmdisk{number}",
            "fileRef": f"file{number}",
            "capacity": str(each.disk.capacity),
            "capacityAllocationUnits": "byte",
            "populatedSize": str(each.populated),
            "format": _FORMAT,
        }
        _add(section, "Disk", attributes=disk)
    for network in sorted({nic.network for nic in hardware.nics}):
        _add(networks, "Network", attributes={"name": network}, Description=network)
    system = _add(envelope, "VirtualSystem", attributes={"id": hardware.name}, Info="A virtual machine")
    Xml.SubElement(system, _q("Name")).text = hardware.name
    _add(system, "OperatingSystemSection", attributes={"id": "1"}, Info="Guest").set(
        f"{{{_VMW}}}osType", hardware.guest_id
    )
    machine = _hardware_section(system, hardware, disks)
    for number, other in enumerate(other_files, len(disks)):
        _add(references, "File", attributes={"id": f"file{number}", "href": other.name, "size": str(other.size)})
        _config(machine, "ExtraConfig", "nvram", f"ovf:/file/file{number}")
    Xml.indent(envelope)
    return _HEAD + Xml.tostring(envelope, encoding="unicode").encode() + b"\n"


def lists_files(descriptor: str, disks: Sequence[OvfDisk], other_files: Sequence[OvfFile] = ()) -> bool:
    """Return whether a server's descriptor is well-formed and names exactly these disks with their sizes.

    The descriptor may name the *other_files* too, but no unknown file.
    """
    try:
        root = Xml.fromstring(descriptor)  # noqa: S314 - expat resolves no external entity
    except Xml.ParseError:
        return False
    found = {
        (file.get(_q("href")) or file.get("href"), file.get(_q("size")) or file.get("size"))
        for file in root.iter(_q("File"))
    }
    needed = {(each.name, str(each.size)) for each in disks}
    return needed <= found <= needed | {(each.name, str(each.size)) for each in other_files}


def networks_of(descriptor: str) -> list[str]:
    """Return the networks in a descriptor.

    For an invalid descriptor, return none: vCenter reports the error.
    """
    try:
        root = Xml.fromstring(descriptor)  # noqa: S314 - expat resolves no external entity
    except Xml.ParseError:
        return []
    names = (each.get(_q("name")) or each.get("name") for each in root.iter(_q("Network")))
    return list(dict.fromkeys(name for name in names if name))


def checksums(digests: Iterable[tuple[str, str]]) -> bytes:
    """Return the content of the .mf file for pairs of name and SHA-256 in hex."""
    return "".join(f"SHA256({name})= {value}\n" for name, value in digests).encode()


def _hardware_section(system: Xml.Element, hardware: Hardware, disks: Sequence[OvfDisk]) -> Xml.Element:
    section = _add(system, "VirtualHardwareSection", Info="Virtual hardware")
    machine = Xml.SubElement(section, _q("System"))
    identity = {"ElementName": "Virtual Hardware Family", "InstanceID": "0", "VirtualSystemType": hardware.version}
    for name, value in identity.items():
        Xml.SubElement(machine, f"{{{_VSSD}}}{name}").text = value
    ids = map(str, itertools.count(1))
    cpus = {"AllocationUnits": "hertz * 10^6", "VirtualQuantity": str(hardware.cpus)}
    item = _item(section, next(ids), _CPU, f"{hardware.cpus} virtual CPU(s)", **cpus)
    cores = Xml.SubElement(item, f"{{{_VMW}}}CoresPerSocket", {_q("required"): "false"})
    cores.text = str(hardware.cores_per_socket)
    memory = {"AllocationUnits": "byte * 2^20", "VirtualQuantity": str(hardware.memory_mib)}
    _item(section, next(ids), _MEMORY, f"{hardware.memory_mib} MiB of memory", **memory)
    used = {each.disk.controller.key for each in disks}
    parents = {each.key: _controller(section, next(ids), each) for each in hardware.controllers if each.key in used}
    for number, each in enumerate(disks):
        place = {"Parent": parents[each.disk.controller.key], "AddressOnParent": str(each.disk.unit)}
        _item(section, next(ids), _DISK, each.disk.label, HostResource=f"ovf:/disk/vmdisk{number}", **place)
    for nic in hardware.nics:
        kind = nic.kind.removeprefix("Virtual").removesuffix("Card")
        _item(section, next(ids), _NETWORK, nic.network, Connection=nic.network, ResourceSubType=kind)
    if hardware.video:
        card = _item(section, next(ids), _VIDEO_CARD, "Video card")
        for key, value in hardware.video:
            _config(card, "Config", key, value)
    for key, value in (("firmware", hardware.firmware), *hardware.settings):
        _config(section, "Config", key, value)
    return section


def _config(section: Xml.Element, kind: str, key: str, value: str) -> None:
    config = Xml.SubElement(section, f"{{{_VMW}}}{kind}", {_q("required"): "false"})
    config.set(f"{{{_VMW}}}key", key)
    config.set(f"{{{_VMW}}}value", value)


def _controller(section: Xml.Element, number: str, controller: Controller) -> str:
    """Add a controller and return its instance id."""
    kind, bus = family(controller.kind), str(controller.bus)
    subtype = {"ResourceSubType": _SUBTYPES[controller.kind]} if controller.kind in _SUBTYPES else {}
    _item(section, number, _CONTROLLERS[kind], f"{kind.upper()} controller {bus}", Address=bus, **subtype)
    return number


def _item(section: Xml.Element, number: str, kind: int, label: str, **properties: str) -> Xml.Element:
    """Add one resource and return it. The schema requires the children in the order of their names."""
    item = Xml.SubElement(section, _q("Item"))
    values = {"ElementName": label, "InstanceID": number, "ResourceType": str(kind), **properties}
    for name in sorted(values, key=str.lower):
        Xml.SubElement(item, f"{{{_RASD}}}{name}").text = values[name]
    return item


def _add(parent: Xml.Element, name: str, *, attributes: dict[str, str] | None = None, **children: str) -> Xml.Element:
    element = Xml.SubElement(parent, _q(name), {_q(key): value for key, value in (attributes or {}).items()})
    for child, text in children.items():
        Xml.SubElement(element, _q(child)).text = text
    return element


def _q(name: str) -> str:
    """Return the qualified name in the OVF namespace."""
    return f"{{{_OVF}}}{name}"
