"""What a VM is made of, as plain values read from a snapshot's config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssvm_worker.errors import InvalidRequest

#: Statuses of a disk in a backup; missing: a snapshot holds it, and the lease does not list it.
EXPORTED, INDEPENDENT, RDM, LEFT_OUT, MISSING = "exported", "independent", "rdm", "left out", "missing"


@dataclass(frozen=True)
class Controller:
    """What disks hang on."""

    key: int
    #: The class in the API: ParaVirtualSCSIController, VirtualNVMEController, …
    kind: str
    bus: int


@dataclass(frozen=True)
class Nic:
    """A network card."""

    #: VirtualVmxnet3, VirtualE1000e, …
    kind: str
    network: str


@dataclass(frozen=True)
class Disk:
    """A virtual disk."""

    key: int
    #: What the vSphere Client calls it: Hard disk 1.
    label: str
    #: Bytes.
    capacity: int
    controller: Controller
    unit: int
    #: Why a snapshot does not hold it: independent or rdm; exported otherwise.
    status: str = EXPORTED
    #: Where changed block tracking stood when the snapshot was made; empty without tracking.
    change_id: str = ""

    @property
    def place(self) -> str:
        """Its controller's family, bus and unit: scsi0:1."""
        return f"{family(self.controller.kind)}{self.controller.bus}:{self.unit}"


@dataclass(frozen=True)
class Hardware:
    """The configuration of a VM as its snapshot holds it."""

    name: str
    guest_id: str
    #: vmx-21
    version: str
    firmware: str
    cpus: int
    memory_mib: int
    controllers: tuple[Controller, ...]
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    is_template: bool = False
    #: What of it is encrypted, in words.
    secrets: tuple[str, ...] = ()


def family(kind: str) -> str:
    """The short name of a controller's class: scsi, nvme, sata or ide."""
    names = {"NVME": "nvme", "AHCI": "sata", "SATA": "sata", "IDE": "ide"}
    return next((short for part, short in names.items() if part in kind), "scsi")


def select_disks(disks: Sequence[Disk], wanted: Sequence[str] | None) -> list[Disk]:
    """The disks named by key, label or place, all that a snapshot holds when None; in their own order.

    Raises InvalidRequest for a name that no disk has, for a disk that no snapshot holds, and when nothing is left.
    """
    if wanted is None:
        chosen = [disk for disk in disks if disk.status == EXPORTED]
    else:
        keys = {_find(disks, name).key for name in wanted}
        chosen = [disk for disk in disks if disk.key in keys]
    if not chosen:
        raise InvalidRequest("The VM has no disk that a snapshot holds", _listed(disks), "Back it up from inside")
    return chosen


def _find(disks: Sequence[Disk], name: str) -> Disk:
    for disk in disks:
        if name.strip().lower() in (str(disk.key), disk.label.lower(), disk.place):
            if disk.status != EXPORTED:
                what = f"The disk {disk.label} is {disk.status}: no snapshot holds it"
                raise InvalidRequest(what, disk.place, "Leave it out, or change its mode in vSphere")
            return disk
    raise InvalidRequest(f"The VM has no disk {name!r}", "disks", f"There are: {_listed(disks)}")


def _listed(disks: Sequence[Disk]) -> str:
    return ", ".join(f"{each.key} = {each.label} = {each.place}" for each in disks) or "none"


def comparable(before: str, now: str) -> bool:
    """Whether changes between two change ids can be asked for: both are of the same tracking.

    An id is ``UUID/number``; another UUID, or none, says that tracking began anew in between.
    """
    return bool(before and now) and before.partition("/")[0] == now.partition("/")[0]
