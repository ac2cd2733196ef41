"""OVF 1.0 descriptors (DMTF DSP0243): a minimal one of our own, a check of a server's, and the checksum file beside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as Xml

from .hardware import Controller, Disk, Hardware, Nic, family

_OVF = "http://schemas.dmtf.org/ovf/envelope/1"
_RASD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
_VSSD = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
_VMW = "http://www.vmware.com/schema/ovf"
#: What VMware's tools write, and look for.
_FORMAT = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
for _prefix, _uri in (("ovf", _OVF), ("rasd", _RASD), ("vssd", _VSSD), ("vmw", _VMW)):
    Xml.register_namespace(_prefix, _uri)
_HEAD = b'<?xml version="1.0" encoding="UTF-8"?>\n'
#: ResourceType of CIM_ResourceAllocationSettingData; a controller's by its family, with the ResourceSubType.
_CPU, _MEMORY, _NETWORK, _DISK = 3, 4, 10, 17
_CONTROLLERS = {"ide": 5, "scsi": 6, "sata": 20, "nvme": 20}
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
    """A disk as it was stored."""

    disk: Disk
    #: The name beside the descriptor.
    name: str
    #: Bytes of the file, counted.
    size: int
    #: Bytes of the disk that hold data.
    populated: int
    #: How the lease named the device.
    lease_key: str


@dataclass(frozen=True)
class OvfFile:
    """A file beside the disks: the firmware's variables."""

    name: str
    #: Bytes.
    size: int
    #: How the lease named it.
    lease_key: str


def build(hardware: Hardware, disks: Sequence[OvfDisk], beside: Sequence[OvfFile] = ()) -> bytes:
    """A descriptor of the VM with just these disks, and its nvram if that is there."""
    envelope = Xml.Element(_q("Envelope"))
    references = _add(envelope, "References")
    section = _add(envelope, "DiskSection", Info="Virtual disks")
    networks = _add(envelope, "NetworkSection", Info="Networks")
    for number, each in enumerate(disks):
        file = {"id": f"file{number}", "href": each.name, "size": str(each.size)}
        _add(references, "File", attributes=file)
        _add(section, "Disk", attributes=_disk_attributes(number, each))
    for network in sorted({nic.network for nic in hardware.nics}):
        _add(networks, "Network", attributes={"name": network}, Description=network)
    system = _add(envelope, "VirtualSystem", attributes={"id": hardware.name}, Info="A virtual machine")
    Xml.SubElement(system, _q("Name")).text = hardware.name
    _add(system, "OperatingSystemSection", attributes={"id": "1"}, Info="Guest").set(
        f"{{{_VMW}}}osType", hardware.guest_id
    )
    machine = _hardware_section(system, hardware, disks)
    for number, it in enumerate(beside, len(disks)):
        _add(references, "File", attributes={"id": f"file{number}", "href": it.name, "size": str(it.size)})
        _config(machine, "ExtraConfig", "nvram", f"ovf:/file/file{number}")
    Xml.indent(envelope)
    return _HEAD + Xml.tostring(envelope, encoding="unicode").encode() + b"\n"


def lists_files(descriptor: str, disks: Sequence[OvfDisk], beside: Sequence[OvfFile] = ()) -> bool:
    """Whether a server's descriptor is well-formed and names these disks with their true sizes, and nothing unknown.

    It may do without what lies *beside* them.
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
    return needed <= found <= needed | {(each.name, str(each.size)) for each in beside}


def networks_of(descriptor: str) -> list[str]:
    """The networks that a descriptor's VM is connected to; none where it cannot be read, which vCenter will say."""
    try:
        root = Xml.fromstring(descriptor)  # noqa: S314 - expat resolves no external entity
    except Xml.ParseError:
        return []
    names = (each.get(_q("name")) or each.get("name") for each in root.iter(_q("Network")))
    return list(dict.fromkeys(name for name in names if name))


def checksums(digests: Iterable[tuple[str, str]]) -> bytes:
    """The .mf of names and SHA-256 in hex."""
    return "".join(f"SHA256({name})= {value}\n" for name, value in digests).encode()


def _hardware_section(system: Xml.Element, hardware: Hardware, disks: Sequence[OvfDisk]) -> Xml.Element:
    section = _add(system, "VirtualHardwareSection", Info="Virtual hardware")
    machine = Xml.SubElement(section, _q("System"))
    identity = {"ElementName": "Virtual Hardware Family", "InstanceID": "0", "VirtualSystemType": hardware.version}
    for name, value in identity.items():
        Xml.SubElement(machine, f"{{{_VSSD}}}{name}").text = value
    ids = _Ids()
    cpus = {"AllocationUnits": "hertz * 10^6", "VirtualQuantity": str(hardware.cpus)}
    _item(section, ids.next(), _CPU, f"{hardware.cpus} virtual CPU(s)", **cpus)
    memory = {"AllocationUnits": "byte * 2^20", "VirtualQuantity": str(hardware.memory_mib)}
    _item(section, ids.next(), _MEMORY, f"{hardware.memory_mib} MiB of memory", **memory)
    parents = {each.key: _controller(section, ids.next(), each) for each in _used(hardware, disks)}
    for number, each in enumerate(disks):
        place = {"Parent": parents[each.disk.controller.key], "AddressOnParent": str(each.disk.unit)}
        _item(section, ids.next(), _DISK, each.disk.label, HostResource=f"ovf:/disk/vmdisk{number}", **place)
    for nic in hardware.nics:
        _item(section, ids.next(), _NETWORK, nic.network, Connection=nic.network, ResourceSubType=_nic_type(nic))
    _config(section, "Config", "firmware", hardware.firmware)
    return section


def _config(section: Xml.Element, kind: str, key: str, value: str) -> None:
    config = Xml.SubElement(section, f"{{{_VMW}}}{kind}", {_q("required"): "false"})
    config.set(f"{{{_VMW}}}key", key)
    config.set(f"{{{_VMW}}}value", value)


class _Ids:
    """Instance ids, from 1."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> str:
        self._last += 1
        return str(self._last)


def _used(hardware: Hardware, disks: Sequence[OvfDisk]) -> list[Controller]:
    """The controllers that the disks hang on, each once."""
    keys = {each.disk.controller.key for each in disks}
    return [each for each in hardware.controllers if each.key in keys]


def _controller(section: Xml.Element, number: str, it: Controller) -> str:
    kind = family(it.kind)
    more = {"ResourceSubType": _SUBTYPES[it.kind]} if it.kind in _SUBTYPES else {}
    _item(section, number, _CONTROLLERS[kind], f"{kind.upper()} controller {it.bus}", Address=str(it.bus), **more)
    return number


def _nic_type(nic: Nic) -> str:
    return nic.kind.removeprefix("Virtual").removesuffix("Card")


def _disk_attributes(number: int, each: OvfDisk) -> dict[str, str]:
    return {
        "diskId": f"vmdisk{number}",
        "fileRef": f"file{number}",
        "capacity": str(each.disk.capacity),
        "capacityAllocationUnits": "byte",
        "populatedSize": str(each.populated),
        "format": _FORMAT,
    }


def _item(section: Xml.Element, number: str, kind: int, label: str, **more: str) -> None:
    """One resource; the schema wants its children in the order of their names."""
    item = Xml.SubElement(section, _q("Item"))
    values = {"ElementName": label, "InstanceID": number, "ResourceType": str(kind), **more}
    for name in sorted(values, key=str.lower):
        Xml.SubElement(item, f"{{{_RASD}}}{name}").text = values[name]


def _add(parent: Xml.Element, name: str, *, attributes: dict[str, str] | None = None, **children: str) -> Xml.Element:
    element = Xml.SubElement(parent, _q(name), {_q(key): value for key, value in (attributes or {}).items()})
    for child, text in children.items():
        Xml.SubElement(element, _q(child)).text = text
    return element


def _q(name: str) -> str:
    return f"{{{_OVF}}}{name}"
