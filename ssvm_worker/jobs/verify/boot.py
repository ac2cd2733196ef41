"""Boot a restored copy of a backup in QEMU without network, and keep a screenshot."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.restore.backup_reader import BackupDisk, read_backup
from ssvm_worker.jobs.scratch import scratch_folder
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes, store_stream
from ssvm_worker.units import GiB, MiB
from ssvm_worker.vm_boot.boot import boot
from ssvm_worker.vm_boot.command_line import MAX_DISKS, BootMachine, Drive, tool

from .screenshots import screenshot_path

_PREFIX = "ssvm-boot-"
#: The memory of a guest if the backup does not say it, and the smallest memory. VMs usually had more.
_DEFAULT_MEMORY, _MIN_MEMORY = GiB, 64 * MiB


def boot_check(attempt: Attempt, store: Store, artifact: Artifact) -> dict[str, Any]:
    """Restore the disks to scratch files, verify every byte, boot the disks, and return what the screen showed.

    Raises CorruptImage if the BIOS finds nothing to boot. Raises ConfigError if QEMU is missing or fails. Raises
    StoreFull if the scratch directory is too small. Also raises the errors of a restore.
    """
    tool("qemu-system-x86_64", "qemu-system-x86")
    parent, given = attempt.settings.boot_dir, attempt.settings.boot
    disks = read_backup(attempt, store, artifact)
    config = _config(store, disks[0].manifest)
    parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parent, _PREFIX) as folder:
        attempt.progress.start("restoring to boot", sum(disk.total("qcow2") for disk in disks))
        drives = [Drive(_restore(disk, folder), _controller(config, disk)) for disk in disks[:MAX_DISKS]]
        attempt.progress.start("booting")
        firmware = str(config.get("firmware") or "bios")
        machine = BootMachine(drives, _memory(config, given.memory), firmware, given.accelerator)
        outcome = boot(machine, folder, given, attempt.check)
    screenshot = screenshot_path(parent, artifact)
    screenshot.parent.mkdir(parents=True, exist_ok=True)
    new = screenshot.with_suffix(".new")
    new.write_bytes(outcome.picture.png())
    new.replace(screenshot)
    if not outcome.bootable:
        raise CorruptImage(
            "The BIOS finds nothing to boot on the disks",
            f"{store.name}:{artifact.prefix}",
            f"See the screenshot {screenshot}. If the VM boots from another device, verify it without boot",
        )
    return {
        "screenshot": str(screenshot),
        "screen": outcome.screen,
        "width": outcome.picture.width,
        "height": outcome.picture.height,
        "seconds": outcome.seconds,
        "events": list(outcome.events),
        "disks": len(machine.drives),
        "firmware": machine.firmware,
        "memory": machine.memory,
        "accelerator": "kvm" if outcome.kvm else "tcg",
        **({"kvm_failure": outcome.kvm_failure} if outcome.kvm_failure else {}),
    }


def _restore(disk: BackupDisk, folder: Path) -> Path:
    """Write a disk as a sparse qcow2. Return its path."""
    hasher, name = Hasher(), f"disk{disk.number}"
    hint = int(disk.entry.facts.get("populated", disk.capacity)) + disk.capacity // 1024 + MiB
    with FileStore("scratch", folder).writer(name, hint, owner=disk.attempt.owner) as sink:
        verify = partial(disk.verify_copy, "qcow2", hasher)
        store_stream(disk.image("qcow2", name), {"scratch": sink}, verify=verify, check=disk.attempt.check)
    return folder / name


# The hardware of the VM.


def _config(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Return the VM's configuration, which is stored with the disks. Return {} if it is missing or unreadable."""
    entry = next((each for each in manifest.entries if each.role == "config"), None)
    try:
        found = json.loads(read_bytes(store, manifest.artifact.key(entry.name))) if entry else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("hardware", {}), dict) else {}


def _memory(config: dict[str, Any], max_bytes: int) -> int:
    hardware = config.get("hardware") or {}
    stored = hardware.get("memoryMB")
    memory = stored * MiB if isinstance(stored, int) and stored > 0 else _DEFAULT_MEMORY
    return max(_MIN_MEMORY, min(memory, max_bytes))


def _controller(config: dict[str, Any], disk: BackupDisk) -> str:
    """Return the class of the disk's controller in vSphere, or "" if it is not known."""
    devices = {each.get("key"): each for each in (config.get("hardware") or {}).get("device") or []}
    own = devices.get(disk.entry.facts.get("disk")) or {}
    return str((devices.get(own.get("controllerKey")) or {}).get("_vimtype", "")).rpartition(".")[2]
