"""Build the command line of a QEMU that boots untrusted disks: no network, no default devices.

The guest is untrusted:
- QEMU runs in its own seccomp filter (``-sandbox``), and prlimit(1) limits its resources.
- QEMU writes to a temporary overlay (``-snapshot``).
- QEMU ends with the worker (setpriv(1), ``--pdeathsig``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.errors import ConfigError
from ssvm_worker.units import GiB, MiB

#: QEMU's names for each controller of vSphere, and for a disk on it. A controller without an equivalent becomes AHCI.
#: Every guest of the last fifteen years has a driver for AHCI.
_CONTROLLERS = {
    "ParaVirtualSCSIController": ("pvscsi", "scsi-hd,bus={id}.0"),
    "VirtualLsiLogicSASController": ("mptsas1068", "scsi-hd,bus={id}.0"),
    "VirtualNVMEController": ("", "nvme,serial={id}"),
}
_ANY_CONTROLLER = ("ich9-ahci", "ide-hd,bus={id}.0")
_IDE = "VirtualIDEController"
#: Each disk has its own controller, and a PC has 32 PCI slots. Further disks are left out.
MAX_DISKS = 16
#: Where distributions install OVMF.
_EFI = (
    "/usr/share/ovmf/OVMF.fd",
    "/usr/share/OVMF/OVMF.fd",
    "/usr/share/edk2/x64/OVMF.4m.fd",
    "/usr/share/qemu/ovmf.fd",
)
#: Address space in addition to the guest's memory. QEMU, its libraries and translated code used 0.9 GiB in a test.
_EXTRA_MEMORY = 3 * GiB
#: Limit of the overlay, and so of what a guest can write.
_MAX_FILE = 8 * GiB
#: QEMU uses the first accelerator that it can open.
_ACCELERATORS = {"auto": ("kvm", "tcg"), "kvm": ("kvm",), "tcg": ("tcg",)}
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Drive:
    """Disk of the guest."""

    #: An absolute path of a qcow2 without a backing file.
    path: Path
    #: Class of its controller in vSphere.
    controller: str = ""


@dataclass(frozen=True)
class BootMachine:
    """Guest to boot."""

    #: The guest boots from the first drive.
    drives: Sequence[Drive]
    #: Bytes of memory.
    memory: int
    #: bios | efi
    firmware: str = "bios"
    #: auto | kvm | tcg. TCG translates every instruction and is about ten times slower. ``auto`` prefers KVM.
    accelerator: str = "auto"


def command(machine: BootMachine, monitor: int, log: Path, cpu_s: int) -> list[str]:
    """Return the command that starts a paused guest. *monitor*: file descriptor for QMP. *log*: log of the firmware.

    Raises ConfigError if a program or the firmware is not installed.
    """
    limits = [f"--as={machine.memory + _EXTRA_MEMORY}", f"--cpu={cpu_s}", f"--fsize={_MAX_FILE}", "--core=0"]
    return [
        *(tool("prlimit", "util-linux"), *limits, "--", tool("setpriv", "util-linux"), "--pdeathsig", "KILL"),
        *(tool("qemu-system-x86_64", "qemu-system-x86"), "-no-user-config", "-nodefaults", "-nic", "none"),
        *("-sandbox", _SANDBOX, "-snapshot", "-S", "-no-shutdown", "-display", "none", "-vga", "std"),
        *("-machine", "pc", "-cpu", "max", "-smp", "1", "-m", f"{machine.memory // MiB}M"),
        *(word for each in _ACCELERATORS[machine.accelerator] for word in ("-accel", each)),
        *_firmware(machine.firmware),
        *("-chardev", f"socket,id=qmp,fd={monitor}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"file,id=log,path={_quoted(log)}", "-device", "isa-debugcon,iobase=0x402,chardev=log"),
        *(word for number, each in enumerate(machine.drives[:MAX_DISKS]) for word in _drive(number, each)),
    ]


def tool(name: str, package: str) -> str:
    """Return the absolute path of a program. Raises ConfigError if it is missing."""
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"{name} is not installed on this worker", name, f"Install {package}, or verify without boot")
    return path


def _firmware(kind: str) -> list[str]:
    if kind != "efi":
        return []
    found = next((each for each in _EFI if Path(each).exists()), None)
    if found is None:
        raise ConfigError("The VM boots with EFI, but OVMF is not installed on this worker", "ovmf", "Install ovmf")
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
    """Double each comma, which otherwise separates values of an option of QEMU."""
    return str(path).replace(",", ",,")
