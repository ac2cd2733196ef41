"""The hardware of a VM as plain values from the configuration of a snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssvm_worker.errors import InvalidRequest

#: Statuses of a disk in a backup. Missing: the snapshot contains the disk, but the lease does not list it.
EXPORTED, INDEPENDENT, RDM, LEFT_OUT, MISSING = "exported", "independent", "rdm", "left out", "missing"


@dataclass(frozen=True)
class Controller:
    """A disk controller."""

    key: int
    #: The class name in the API: ParaVirtualSCSIController, VirtualNVMEController, …
    kind: str
    bus: int


@dataclass(frozen=True)
class Nic:
    """A network adapter."""

    #: VirtualVmxnet3, VirtualE1000e, …
    kind: str
    network: str


@dataclass(frozen=True)
class Disk:
    """A virtual disk."""

    key: int
    #: The name in the vSphere Client: Hard disk 1.
    label: str
    #: Bytes.
    capacity: int
    controller: Controller
    unit: int
    #: ``independent`` or ``rdm`` for a disk that no snapshot contains, otherwise ``exported``.
    status: str = EXPORTED
    #: The change id of changed block tracking at the time of the snapshot; empty without tracking.
    change_id: str = ""

    @property
    def place(self) -> str:
        """Return the controller's family, the bus and the unit: scsi0:1."""
        return f"{family(self.controller.kind)}{self.controller.bus}:{self.unit}"


@dataclass(frozen=True)
class Hardware:
    """The configuration of a VM in its snapshot."""

    name: str
    guest_id: str
    #: For example vmx-21.
    version: str
    firmware: str
    cpus: int
    memory_mib: int
    controllers: tuple[Controller, ...]
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    is_template: bool = False
    cores_per_socket: int = 1
    #: Further settings, and those of the video card: keys in OVF descriptors of VMware, with their values.
    settings: tuple[tuple[str, str], ...] = ()
    video: tuple[tuple[str, str], ...] = ()
    #: Descriptions of the encrypted parts, and whether disks or files are among them.
    secrets: tuple[str, ...] = ()
    encrypted: bool = False


def family(kind: str) -> str:
    """Return the short name for a controller's class name: scsi, nvme, sata or ide."""
    names = {"NVME": "nvme", "AHCI": "sata", "SATA": "sata", "IDE": "ide"}
    return next((short for part, short in names.items() if part in kind), "scsi")


def select_disks(disks: Sequence[Disk], wanted: Sequence[str] | None) -> list[Disk]:
    """Return the disks with the *wanted* keys, labels or places, in the order of *disks*.

    Without *wanted*, return all disks that a snapshot contains.
    Raises InvalidRequest for an unknown name, a disk that no snapshot contains, and an empty result.
    """
    if wanted is None:
        chosen = [disk for disk in disks if disk.status == EXPORTED]
    else:
        keys = {_find(disks, name).key for name in wanted}
        chosen = [disk for disk in disks if disk.key in keys]
    if not chosen:
        raise InvalidRequest(
            "The VM has no disk that a snapshot contains", _listed(disks), "Back it up from inside the guest"
        )
    return chosen


def _find(disks: Sequence[Disk], name: str) -> Disk:
    for disk in disks:
        if name.strip().lower() in (str(disk.key), disk.label.lower(), disk.place):
            if disk.status != EXPORTED:
                what = f"The disk {disk.label} is {disk.status}: no snapshot contains it"
                raise InvalidRequest(what, disk.place, "Omit it from the request, or change its mode in vSphere")
            return disk
    raise InvalidRequest(f"The VM has no disk {name!r}", "disks", f"There are: {_listed(disks)}")


def _listed(disks: Sequence[Disk]) -> str:
    return ", ".join(f"{each.key} = {each.label} = {each.place}" for each in disks) or "none"


def same_tracking(before: str, now: str) -> bool:
    """Return whether two change ids are comparable: both are from the same period of tracking.

    An id is ``UUID/number``. A different UUID, or no id, means that tracking restarted in between.
    """
    return bool(before and now) and before.partition("/")[0] == now.partition("/")[0]
