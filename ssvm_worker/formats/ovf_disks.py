"""Read the disks of an OVF with their controllers, and make an OVF of one of them.

A ``Disk`` names its file and has a capacity. A hardware ``Item`` of type 17 names the disk as its ``HostResource``. The
item's ``Parent`` is the item of the controller. The order, the numbers and the boot disk are those of CloudStack's
OVFHelper: it lists the disks in the order of the hardware items, then the ISO images. The boot disk is the one whose
file is the first disk in the References.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from xml.dom import minidom
from xml.etree import ElementTree as Xml

from ssvm_worker.errors import CorruptImage, ObjectNotFound

from .detect import ASK_PUBLISHER
from .ova import attributes_of, file_name, local_name, parse, read_descriptor

#: CIM_ResourceAllocationSettingData.ResourceType of a disk.
_DISK_DRIVE = "17"
_UNITS = {"kb": 10, "kilobytes": 10, "mb": 20, "megabytes": 20, "gb": 30, "gigabytes": 30}
_POWER = re.compile(r"byte\s*\*\s*2\s*\^\s*(\d{1,2})", re.IGNORECASE)
_HOST_RESOURCE = re.compile(r"(?:ovf:/?)?/(disk|file)/(.+)")
#: The largest capacity that is read, 2^63 - 1: the server's numbers have 64 bits.
_MAX_CAPACITY = (1 << 63) - 1


@dataclass(frozen=True)
class PackageDisk:
    """One disk or ISO image of an OVF."""

    #: The disk's id in the OVF. For an ISO image, the id of its file.
    id: str
    #: The name of its file in the package. None: the disk is created empty.
    file: str | None
    #: Bytes as the guest sees them. 0 if the OVF does not state them.
    capacity: int
    #: Bytes of the file. 0 if the OVF does not state them.
    size: int
    bootable: bool
    is_iso: bool
    #: The name of the controller, such as ``SCSI Controller 0``, and its type, such as ``lsilogic``.
    controller: str
    controller_type: str
    number: int
    #: The ids of the deployment configurations that have this disk, separated by blanks. "": all of them.
    configuration: str


def read_disks(data: bytes, where: str, configuration: str = "") -> list[PackageDisk]:
    """Return the disks of an OVF, and then its ISO images.

    *configuration* leaves out the disks of other deployment configurations. Raises what ``read_descriptor`` raises.
    """
    read_descriptor(data, where)
    root = parse(data, where)
    files = {each["id"]: each for each in _attributes(root, "File")}
    disks = {each.get("diskId", ""): each for each in _attributes(root, "Disk")}
    items = [_Item.of(each) for each in root.iter() if local_name(each.tag) == "Item"]
    found = [
        (disks[item.disk], item)
        for item in items
        if item.kind == _DISK_DRIVE and item.disk in disks and item.is_in(configuration)
    ]
    if not any(item.kind == _DISK_DRIVE for item in items):  # the OVF describes no hardware
        found = [(each, _Item({})) for each in disks.values()]
    references = {each.get("fileRef") for each in disks.values()}
    boot = next((id_ for id_, each in files.items() if id_ in references and not _is_iso(each)), "")
    result = []
    for number, (disk, item) in enumerate(found):
        reference = disk.get("fileRef", "")
        file = files.get(reference, {})
        root_item = _controller(item, items)
        result.append(
            PackageDisk(
                id=disk.get("diskId", ""),
                file=file_name(file["href"]) if file else None,
                capacity=_capacity(disk),
                size=_number(file.get("size", "")),
                bootable=bool(reference) and reference == boot,
                is_iso=_is_iso(file),
                controller=root_item.values.get("ElementName") or root_item.values.get("Caption", ""),
                controller_type=root_item.values.get("ResourceSubType", ""),
                number=number,
                configuration=item.values.get("configuration", ""),
            )
        )
    isos = [each for id_, each in files.items() if _is_iso(each) and id_ not in references]
    for file in isos:
        size = _number(file.get("size", ""))
        result.append(
            PackageDisk(file["id"], file_name(file["href"]), size, size, False, True, "", "", len(result), "")
        )
    return result


def keep_disk(data: bytes, file: str, where: str) -> bytes:
    """Return the OVF with only the disk of that *file*: without other files, disks, and items of other disks.

    The prefixes of namespaces stay, because CloudStack compares them. Raises ObjectNotFound for an unknown file.
    """
    if file not in read_descriptor(data, where).disks:
        raise ObjectNotFound(f"The OVF has no disk {file[:80]!a}", where, "Name a disk of this OVF")
    kept = {each["id"] for each in _attributes(parse(data, where), "File") if file_name(each["href"]) == file}
    document = minidom.parseString(data.decode("utf-8-sig"))  # noqa: S318 - read_descriptor refuses document types
    kept_disks = set()
    for element in _elements(document, "Disk"):
        if _attribute(element, "fileRef") in kept:
            kept_disks.add(_attribute(element, "diskId"))
        else:
            _remove(element)
    for element in _elements(document, "File"):
        if _attribute(element, "id") not in kept:
            _remove(element)
    for element in _elements(document, "Item"):
        found = _elements(element, "HostResource")
        resources = ["".join(t.data for t in each.childNodes if isinstance(t, minidom.Text)).strip() for each in found]
        matches = [match for each in resources if (match := _HOST_RESOURCE.fullmatch(each))]
        if any(match[2] not in (kept_disks if match[1] == "disk" else kept) for match in matches):
            _remove(element)
    result = bytes(document.toxml(encoding="UTF-8"))
    if read_descriptor(result, where).disks != (file,):
        raise CorruptImage("The disks of the OVF cannot be separated", where, ASK_PUBLISHER)
    return result


@dataclass(frozen=True)
class _Item:
    """One hardware item: the texts of its elements by name, and its configurations."""

    values: Mapping[str, str]

    @classmethod
    def of(cls, element: Xml.Element) -> _Item:
        values = {local_name(each.tag): (each.text or "").strip() for each in element}
        return cls(values | {"configuration": attributes_of(element).get("configuration", "").strip()})

    @property
    def kind(self) -> str:
        return self.values.get("ResourceType", "")

    @property
    def disk(self) -> str:
        """Return the id of the disk. As in CloudStack, other forms of the reference end with the id."""
        return self.values.get("HostResource", "").rpartition("/")[2]

    def is_in(self, configuration: str) -> bool:
        own = self.values.get("configuration", "").split()
        return not configuration or not own or configuration in own


def _controller(item: _Item, items: list[_Item]) -> _Item:
    """Return the item at the root of the item's parents. A hostile OVF may have parents in a circle."""
    by_id = {each.values.get("InstanceID") or each.values.get("InstanceId", ""): each for each in items}
    seen: set[str] = set()
    while (parent := item.values.get("Parent", "")) in by_id and parent not in seen:
        seen.add(parent)
        item = by_id[parent]
    return item if seen else _Item({})


def _is_iso(file: Mapping[str, str]) -> bool:
    return file.get("href", "").lower().endswith("iso")


def _capacity(disk: Mapping[str, str]) -> int:
    unit = disk.get("capacityAllocationUnits", "").strip()
    power = _POWER.fullmatch(unit)
    shift = int(power[1]) if power else _UNITS.get(unit.lower(), 0)
    capacity = _number(disk.get("capacity", "")) << shift
    return capacity if capacity <= _MAX_CAPACITY else 0


def _number(text: str) -> int:
    """Return a number of at most 18 digits. Return 0 for anything else, such as a reference to a property."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0


def _attributes(root: Xml.Element, name: str) -> Iterator[dict[str, str]]:
    return (attributes_of(each) for each in root.iter() if local_name(each.tag) == name)


def _elements(parent: minidom.Document | minidom.Element, name: str) -> list[minidom.Element]:
    return list(parent.getElementsByTagNameNS("*", name))


def _attribute(element: minidom.Element, name: str) -> str:
    return next((value for key, value in element.attributes.items() if key.rpartition(":")[2] == name), "")


def _remove(element: minidom.Element) -> None:
    if element.parentNode is not None:
        element.parentNode.removeChild(element)
