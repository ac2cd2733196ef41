"""The command line of a QEMU that boots a stranger's disks: no network, no default devices, only what is named here.

The guest is hostile until proven. QEMU runs in its own seccomp filter (``-sandbox``), with limits by prlimit(1), writes
to an overlay that nobody keeps (``-snapshot``), and dies with the worker (setpriv(1), ``--pdeathsig``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.errors import ConfigError
from ssvm_worker.units import GiB, MiB

#: QEMU's name for each of vSphere's controllers, and of a disk on it. What it has no like of becomes AHCI, which every
#: guest of the last fifteen years has a driver for.
_CONTROLLERS = {
    "ParaVirtualSCSIController": ("pvscsi", "scsi-hd,bus={id}.0"),
    "VirtualLsiLogicSASController": ("mptsas1068", "scsi-hd,bus={id}.0"),
    "VirtualNVMEController": ("", "nvme,serial={id}"),
}
_ANY_CONTROLLER = ("ich9-ahci", "ide-hd,bus={id}.0")
_IDE = "VirtualIDEController"
#: Each disk has a controller of its own, and a PC has 32 PCI slots; the disks beyond are left out.
MOST_DISKS = 16
#: Where distributions put OVMF.
_EFI = (
    "/usr/share/ovmf/OVMF.fd",
    "/usr/share/OVMF/OVMF.fd",
    "/usr/share/edk2/x64/OVMF.4m.fd",
    "/usr/share/qemu/ovmf.fd",
)
#: Address space beside the guest's memory: QEMU, its libraries and translated code took 0.9 GiB here.
_BESIDE = 3 * GiB
#: Of the overlay, and so what a guest can write.
_LARGEST_FILE = 8 * GiB
#: QEMU uses the first that it can open.
_ACCELERATORS = {"auto": ("kvm", "tcg"), "kvm": ("kvm",), "tcg": ("tcg",)}
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Drive:
    """A disk of the guest."""

    #: Absolute; a qcow2 without a backing file.
    path: Path
    #: As vSphere names the class of its controller.
    controller: str = ""


@dataclass(frozen=True)
class BootMachine:
    """A guest."""

    #: The first is booted from.
    drives: Sequence[Drive]
    #: Bytes.
    memory: int
    #: bios | efi
    firmware: str = "bios"
    #: auto | kvm | tcg. TCG translates every instruction and is about ten times slower. ``auto`` prefers KVM.
    accelerator: str = "auto"


def command(machine: BootMachine, monitor: int, log: Path, cpu_s: int) -> list[str]:
    """What starts it, paused. *monitor*: the file descriptor for QMP; *log*: takes what the firmware says.

    Raises ConfigError for a program or a firmware that is not installed.
    """
    limits = [f"--as={machine.memory + _BESIDE}", f"--cpu={cpu_s}", f"--fsize={_LARGEST_FILE}", "--core=0"]
    return [
        *(tool("prlimit", "util-linux"), *limits, "--", tool("setpriv", "util-linux"), "--pdeathsig", "KILL"),
        *(tool("qemu-system-x86_64", "qemu-system-x86"), "-no-user-config", "-nodefaults", "-nic", "none"),
        *("-sandbox", _SANDBOX, "-snapshot", "-S", "-no-shutdown", "-display", "none", "-vga", "std"),
        *("-machine", "pc", "-cpu", "max", "-smp", "1", "-m", f"{machine.memory // MiB}M"),
        *(word for each in _ACCELERATORS[machine.accelerator] for word in ("-accel", each)),
        *_firmware(machine.firmware),
        *("-chardev", f"socket,id=qmp,fd={monitor}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"file,id=log,path={_quoted(log)}", "-device", "isa-debugcon,iobase=0x402,chardev=log"),
        *(word for number, each in enumerate(machine.drives[:MOST_DISKS]) for word in _drive(number, each)),
    ]


def tool(name: str, package: str) -> str:
    """The absolute path of a program; ConfigError where it is missing."""
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"{name} is not installed on this worker", name, f"Install {package}, or verify without boot")
    return path


def _firmware(kind: str) -> list[str]:
    if kind != "efi":
        return []
    found = next((each for each in _EFI if Path(each).exists()), None)
    if found is None:
        raise ConfigError("The VM boots by EFI, and OVMF is not installed on this worker", "ovmf", "Install ovmf")
    return ["-bios", found]


def _drive(number: int, drive: Drive) -> Iterator[str]:
    id_ = f"c{number}"
    controller, disk = _CONTROLLERS.get(drive.controller, _ANY_CONTROLLER)
    if drive.controller == _IDE and number < 4:
        controller, disk = "", f"ide-hd,bus=ide.{number // 2},unit={number % 2}"
    yield from ("-drive", f"if=none,id=d{number},format=qcow2,file={_quoted(drive.path)}")
    if controller:
        yield from ("-device", f"{controller},id={id_}")
    yield from ("-device", f"{disk.format(id=id_)},drive=d{number},bootindex={number + 1}")


def _quoted(path: Path) -> str:
    """A comma in a value of QEMU's is doubled."""
    return str(path).replace(",", ",,")
