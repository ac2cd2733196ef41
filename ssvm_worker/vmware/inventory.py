"""The search for a VM by any of its names, and its configuration as plain values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.errors import SourceNotFound, SourceUnavailable

from .connection import Connection
from .faults import translated
from .hardware import EXPORTED, INDEPENDENT, RDM, Controller, Disk, Hardware, Nic

#: Ids in vCenter have the form vm-12. Ids on a standalone host are numbers.
_MOREF = re.compile(r"(vm-)?\d+")
#: The faults of an object that is gone, or that the user may not read.
_UNREADABLE = (vmodl.fault.SecurityError, vmodl.fault.ManagedObjectNotFound)
#: The settings that a descriptor of the worker contains, by their keys in OVF descriptors of vSphere 7 and 8.
_SETTINGS = (
    "bootOptions.efiSecureBootEnabled",
    "cpuHotAddEnabled",
    "flags.vbsEnabled",
    "flags.vvtdEnabled",
    "memoryHotAddEnabled",
    "nestedHVEnabled",
)
#: The same of the video card.
_VIDEO = (
    "enable3DSupport",
    "graphicsMemorySizeInKB",
    "numDisplays",
    "use3dRenderer",
    "useAutoDetect",
    "videoRamSizeInKB",
)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def find_vm(connection: Connection, name: str) -> Any:
    """Return the VM with that managed object id, instance UUID or inventory path (/DC0/vm/folder/name).

    Raises SourceNotFound with the kind of name that was assumed.
    """
    with translated("Searching for the VM", name):
        if _MOREF.fullmatch(name):
            found, how = _by_moref(connection, name), "a managed object id"
        elif _UUID.fullmatch(name):
            found = connection.content.searchIndex.FindByUuid(None, name, True, True)
            how = "an instance UUID"
        else:
            found = connection.content.searchIndex.FindByInventoryPath(name.strip("/"))
            how = "an inventory path"
    if not isinstance(found, vim.VirtualMachine):
        raise SourceNotFound(
            f"No VM has this name (searched for {how})",
            f"{connection.address.name}: {name}",
            "Give the id (vm-12), the instance UUID or the path (/Datacenter/vm/Folder/Name)",
        )
    return found


def _by_moref(connection: Connection, moref: str) -> Any:
    found = connection.object(vim.VirtualMachine, moref)
    try:
        connection.read(found, "name")
    except vmodl.fault.ManagedObjectNotFound:
        return None
    return found


def config_of(connection: Connection, entity: Any) -> Any:
    """Return the VirtualMachineConfigInfo of a VM or a snapshot. Raises SourceUnavailable if vCenter has none."""
    with translated("Reading the configuration", entity._moId):
        config = connection.read(entity, "config")["config"]
    if config is None:
        raise SourceUnavailable("vCenter has no configuration", entity._moId, "Check if the VM is accessible")
    return config


def host_of(connection: Connection, vm: Any) -> str:
    """Return the vCenter's name and the id of the VM's host. Together they identify an ESXi host.

    The id is ``?`` if the user may not read it.
    """
    with translated("Searching for the VM's host", vm._moId):
        try:
            host = connection.read(vm, "runtime.host")["runtime.host"]
        except vim.fault.NotAuthenticated:  # a SecurityError too
            raise
        except vmodl.fault.SecurityError:
            host = None
    return f"{connection.address.name}:{host._moId if host else '?'}"


def is_on(connection: Connection, vm: Any) -> bool:
    """Return whether a VM is powered on."""
    with translated("Reading the power state", vm._moId):
        return str(connection.read(vm, "runtime.powerState")["runtime.powerState"]) == "poweredOn"


@dataclass(frozen=True)
class DatastoreSpace:
    """The space of a datastore, as vSphere reports it. It can be minutes old."""

    #: The vCenter's name and the managed object id.
    id: str
    name: str
    #: Bytes.
    capacity: int
    free: int

    @property
    def free_percent(self) -> float:
        """Return the free part of the capacity."""
        return 100.0 * self.free / self.capacity if self.capacity else 100.0


def datastores_of(connection: Connection, vm: Any) -> list[DatastoreSpace]:
    """Return the datastores of a VM that the user may read."""
    found = []
    with translated("Reading the VM's datastores", vm._moId):
        for each in connection.read(vm, "datastore")["datastore"] or ():
            try:
                summary = connection.read(each, "summary")["summary"]
            except vim.fault.NotAuthenticated:
                raise
            except vmodl.fault.SecurityError:
                continue
            if summary:
                id_ = f"{connection.address.name}:{each._moId}"
                found.append(DatastoreSpace(id_, summary.name, summary.capacity or 0, summary.freeSpace or 0))
    return found


def network_names(connection: Connection, config: Any) -> dict[str, str]:
    """Return the names of the distributed port groups of a configuration, by their keys.

    A port group that is gone, or that the user may not read, has no name here.
    """
    keys = {key for each in config.hardware.device if (key := _portgroup(each))}
    names = {}
    for key in keys:
        entity = connection.object(vim.dvs.DistributedVirtualPortgroup, key)
        with translated("Reading the name of a port group", key), suppress(*_UNREADABLE):
            names[key] = connection.read(entity, "name")["name"] or key
    return names


def _portgroup(device: Any) -> str:
    return getattr(getattr(getattr(device, "backing", None), "port", None), "portgroupKey", None) or ""


def read_hardware(config: Any, networks: Mapping[str, str] = MappingProxyType({})) -> Hardware:
    """Return the hardware of a VirtualMachineConfigInfo as plain values. *networks* is from ``network_names``."""
    devices = config.hardware.device
    controllers = {
        each.key: Controller(each.key, _kind(each), each.busNumber)
        for each in devices
        if isinstance(each, vim.vm.device.VirtualController)
    }
    return Hardware(
        name=config.name,
        guest_id=config.guestId or "otherGuest64",
        version=config.version or "vmx-13",
        firmware=config.firmware or "bios",
        cpus=config.hardware.numCPU,
        memory_mib=config.hardware.memoryMB,
        controllers=tuple(controllers.values()),
        disks=tuple(_disk(each, controllers) for each in devices if isinstance(each, vim.vm.device.VirtualDisk)),
        nics=tuple(_nic(each, networks) for each in devices if isinstance(each, vim.vm.device.VirtualEthernetCard)),
        is_template=bool(config.template),
        secrets=tuple(_secrets(config)),
        encrypted=_is_encrypted(config),
        cores_per_socket=config.hardware.numCoresPerSocket or 1,
        settings=tuple(_settings(config)),
        video=tuple(
            (name, _text(value))
            for each in devices
            if isinstance(each, vim.vm.device.VirtualVideoCard)
            for name in _VIDEO
            if (value := getattr(each, name, None)) is not None
        ),
    )


def _settings(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the settings that are set, by their keys in OVF descriptors of VMware."""
    parts = {"bootOptions": config.bootOptions, "flags": config.flags, "": config}
    for key in _SETTINGS:
        part, _, name = key.rpartition(".")
        value = getattr(parts[part], name, None)
        if value is not None:
            yield key, _text(value)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_encrypted(config: Any) -> bool:
    backings = [getattr(each, "backing", None) for each in config.hardware.device]
    return bool(config.keyId or any(getattr(each, "keyId", None) for each in backings))


def _secrets(config: Any) -> Iterator[str]:
    """Yield a description of each encrypted part."""
    devices = config.hardware.device
    if _is_encrypted(config):
        yield "encrypted disks or files"
    if any(isinstance(each, vim.vm.device.VirtualTPM) for each in devices):
        yield "a virtual TPM, whose secrets are not exported"


def _kind(device: Any) -> str:
    return type(device).__name__.rpartition(".")[2]


def _disk(device: Any, controllers: dict[int, Controller]) -> Disk:
    label = device.deviceInfo.label if device.deviceInfo else str(device.key)
    capacity = device.capacityInBytes or device.capacityInKB * 1024
    controller = controllers.get(device.controllerKey) or Controller(device.controllerKey, "", 0)
    return Disk(device.key, label, capacity, controller, device.unitNumber or 0, *_backing(device.backing))


def _backing(backing: Any) -> tuple[str, str]:
    """Return status and change id. No snapshot contains independent disks or raw devices in physical mode."""
    change_id = getattr(backing, "changeId", None) or ""
    if getattr(backing, "compatibilityMode", "") == "physicalMode":
        return RDM, change_id
    independent = (getattr(backing, "diskMode", "") or "").startswith("independent")
    return INDEPENDENT if independent else EXPORTED, change_id


def _nic(device: Any, networks: Mapping[str, str]) -> Nic:
    """Return an adapter. The summary of one on a distributed switch is no name: ``DVSwitch: 50 2a …``."""
    backing = device.backing
    network = networks.get(_portgroup(device)) or getattr(backing, "deviceName", None)
    network = network or getattr(backing, "opaqueNetworkId", None)
    network = network or (device.deviceInfo.summary if device.deviceInfo else "")
    return Nic(_kind(device), network or "VM Network")
