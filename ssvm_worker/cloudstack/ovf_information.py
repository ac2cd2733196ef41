"""What the OVF of an OVA says, in the server's form. It is for templates that are deployed as they are.

The server reads it from the answer to PURGE, and from the last answer about an upload. It offers the properties,
networks, configurations and licenses to the user of the template. The names and the rules are those of CloudStack's
OVFHelper.

Differences from the Java agent:

- ``path`` of a disk is its key. The server does not use it here.
- A network that only a network card names has its name. The Java agent sends it without a name.
- A hardware item without a type is left out: the server cannot store it, and its template would fail.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as Xml

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.formats import ova
from ssvm_worker.formats.ova import attributes_of, local_name
from ssvm_worker.formats.ovf_disks import PackageDisk, read_disks
from ssvm_worker.jobs.split.job import find_descriptor
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes

from .transfer_objects import DatadiskTO, OVFInformationTO

#: CIM_ResourceAllocationSettingData.ResourceType, from 1 on, by CloudStack's names.
_TYPES = (
    *("Other", "ComputerSystem", "Processor", "Memory", "IDEController", "ParallelSCSIHBA", "FC_HBA", "iSCSI_HBA"),
    *("IB_HCA", "EthernetAdapter", "OtherNetworkAdapter", "IO_Slot", "IO_Device", "FloppyDrive", "CD_Drive"),
    *("DVD_Drive", "DiskDrive", "TapeDrive", "StorageExtent", "OtherStorageDevice", "SerialPort", "ParallelPort"),
    *("USBController", "GraphicsController", "IEEE_1394_Controller", "PartitionableUnit", "BasePartitionableUnit"),
    *("PowerSupply", "CoolingCapacity", "EthernetSwitchPort", "LogicalDisk", "StorageVolume", "EthernetConnection"),
)
#: The fields of a hardware item that are texts, and those that are numbers.
_TEXTS = ("AddressOnParent", "AllocationUnits", "Description", "ElementName", "HostResource", "Parent")
_NUMBERS = ("Limit", "Reservation", "VirtualQuantity")
_MAX_LONG = (1 << 63) - 1

Json = dict[str, Any]


def read_datadisks(store: Store, artifact: Artifact, configuration: str = "") -> list[DatadiskTO]:
    """Return the disks and ISO images of an OVA. Raise CorruptImage if the store lacks a file that the OVF names."""
    key = find_descriptor(store, artifact.prefix)
    return _disks(store, artifact, read_bytes(store, key, ova.MAX_TEXT), f"{store.name}:{key}", configuration)


def read_information(store: Store, artifact: Artifact) -> OVFInformationTO:
    """Return what the OVF of an OVA says. Raises what ``read_datadisks`` raises."""
    key = find_descriptor(store, artifact.prefix)
    data, where = read_bytes(store, key, ova.MAX_TEXT), f"{store.name}:{key}"
    disks, root = _disks(store, artifact, data, where, ""), ova.parse(data, where)
    found = {
        "properties": _properties(root),
        "networks": _networks(root),
        "disks": disks,
        "hardware_section": _hardware(root),
        "eula_sections": _licenses(root),
        "guest_os_info": _guest(root),
    }
    return OVFInformationTO(**{name: value for name, value in found.items() if value})


def _disks(store: Store, artifact: Artifact, data: bytes, where: str, configuration: str) -> list[DatadiskTO]:
    manifest = find_manifest(store, artifact)
    return [_disk(store, artifact, each, manifest) for each in read_disks(data, where, configuration)]


def _disk(store: Store, artifact: Artifact, disk: PackageDisk, manifest: Manifest | None) -> DatadiskTO:
    path, size, capacity = None, 0, disk.capacity
    if disk.file:
        path = artifact.key(disk.file)
        try:
            size = store.stat(path).size
        except ObjectNotFound as error:
            what = f"The OVA lacks a file that its OVF names: {disk.file!a}"
            raise CorruptImage(what, f"{store.name}:{artifact.prefix}", "Register the template again") from error
        entry = manifest.entry(disk.file) if manifest else None
        # What a worker has found in the disk itself is more certain than the OVF.
        capacity = int(entry.facts.get("virtual_size", capacity)) if entry else capacity
    return DatadiskTO(
        path=path,
        virtual_size=capacity or size,
        file_size=size,
        bootable=disk.bootable,
        disk_id=disk.id,
        is_iso=disk.is_iso,
        disk_controller=disk.controller,
        disk_controller_sub_type=disk.controller_type,
        disk_number=disk.number,
        configuration=disk.configuration,
    )


def _properties(root: Xml.Element) -> list[Json]:
    """Return the properties that a user may set, with the category before them."""
    found: list[Json] = []
    category = None
    for child in (child for section in _all(root, "ProductSection") for child in section):
        values = attributes_of(child)
        if local_name(child.tag) == "Category":
            category = child.text or ""
        is_property = local_name(child.tag) == "Property" and values.get("key", "").strip()
        if is_property and values.get("userConfigurable", "").lower() == "true":
            texts = _children(child)
            found.append(
                _without_nulls(
                    key=values["key"],
                    type=values.get("type", ""),
                    value=values.get("value", ""),
                    qualifiers=values.get("qualifiers", ""),
                    userConfigurable=True,
                    label=texts.get("Label"),
                    description=texts.get("Description"),
                    password=values.get("password", "").lower() == "true",
                    index=len(found),
                    category=category,
                )
            )
    return found


def _networks(root: Xml.Element) -> list[Json]:
    """Return the networks, each with its network card."""
    found: dict[str, Json] = {}
    unconnected = {"addressOnParent": 0, "automaticAllocation": False, "InstanceID": 0}
    for each in _all(root, "Network"):
        network, description = attributes_of(each).get("name", ""), _children(each).get("Description")
        found[network] = unconnected | _without_nulls(name=network, networkDescription=description)
    for values in (_children(each) for each in _all(root, "Item")):
        if (name := values.get("Connection")) is not None:
            card = _without_nulls(
                addressOnParent=_number(values.get("AddressOnParent")),
                automaticAllocation=values.get("AutomaticAllocation", "").lower() == "true",
                nicDescription=values.get("Description"),
                elementName=values.get("ElementName"),
                InstanceID=_number(values.get("InstanceID")),
                resourceSubType=values.get("ResourceSubType"),
                resourceType=values.get("ResourceType"),
            )
            found[name] = found.get(name, unconnected | {"name": name}) | card
    return list(found.values())


def _hardware(root: Xml.Element) -> Json:
    """Return the hardware: the items of all configurations, the configurations, and the version of the hardware."""
    section = next(_all(root, "VirtualHardwareSection"), None)
    items = [_item(each) for each in section if local_name(each.tag) == "Item"] if section is not None else []
    items = [each for each in items if "resourceType" in each]
    configurations: list[Json] = []
    options = next(_all(root, "DeploymentOptionSection"), None)
    for option in (
        each for each in (options if options is not None else ()) if local_name(each.tag) == "Configuration"
    ):
        id_, texts = attributes_of(option).get("id", ""), _children(option)
        configurations.append(
            _without_nulls(
                id=id_,
                label=texts.get("Label"),
                description=texts.get("Description"),
                hardwareItems=[each for each in items if id_ in each["configurationIds"].split()],
                index=len(configurations),
            )
        )
    system = next(_all(root, "System"), None)
    versions = _children(system).get("VirtualSystemType", "") if system is not None else ""
    return _without_nulls(
        minimiumHardwareVersion=min(versions.split(",")) if versions.strip() else None,
        configurations=configurations,
        commonHardwareItems=[each for each in items if not each["configurationIds"].strip()] if items else None,
    )


def _item(element: Xml.Element) -> Json:
    values = _children(element)
    kind = _number(values.get("ResourceType"))
    name = None
    if kind is not None:
        name = _TYPES[kind - 1] if 0 < kind <= len(_TYPES) else "DMTF_reserved" if kind < 1 << 15 else "VendorReserved"
    return _without_nulls(
        automaticAllocation=False,
        automaticDeallocation=False,
        instanceId=values.get("InstanceID"),
        resourceType=name,
        weight=0,
        configurationIds=attributes_of(element).get("configuration", ""),
        **{f"{each[0].lower()}{each[1:]}": values.get(each) for each in _TEXTS},
        **{f"{each[0].lower()}{each[1:]}": _number(values.get(each)) for each in _NUMBERS},
    )


def _licenses(root: Xml.Element) -> list[Json]:
    """Return the licenses. Java's bytes have a sign."""
    found: list[Json] = []
    for values in (_children(each) for each in _all(root, "EulaSection")):
        if "License" in values:
            packed = gzip.compress(values["License"].encode(), mtime=0)
            signed = [each - 256 if each > 127 else each for each in packed]
            found.append(_without_nulls(info=values.get("Info"), compressedLicense=signed, index=len(found)))
    return found


def _guest(root: Xml.Element) -> Json:
    section = next(_all(root, "OperatingSystemSection"), None)
    if section is None:
        return {}
    return _without_nulls(t=attributes_of(section).get("osType", ""), u=_children(section).get("Description"))


def _all(root: Xml.Element, name: str) -> Iterator[Xml.Element]:
    return (each for each in root.iter() if local_name(each.tag) == name)


def _children(element: Xml.Element) -> dict[str, str]:
    """Return the texts of the elements in an element. If several have one name, return the first."""
    return {local_name(each.tag): "".join(each.itertext()) for each in reversed(element)}


def _number(text: str | None) -> int | None:
    """Return a number of 64 bits, or None for another text."""
    digits = (text or "").removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
        return None
    value = int(text or "")
    return value if abs(value) <= _MAX_LONG else None


def _without_nulls(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
