"""Boots a restored copy of a backup in QEMU, without network, and keeps a screenshot."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Manifest
from ssvm_worker.errors import ConfigError, CorruptImage
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.restore.backup_reader import BackupDisk, read_backup
from ssvm_worker.jobs.scratch import scratch_folder
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.fan_out import store_stream
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.units import GiB, MiB
from ssvm_worker.vm_boot.boot import BootOutcome, BootTimeouts, boot
from ssvm_worker.vm_boot.command_line import MOST_DISKS, BootMachine, Drive, tool

from .screenshots import screenshot_path

_PREFIX = "ssvm-boot-"
#: A guest's memory where the backup does not tell it, and its least: what the VM had is more as a rule.
_MEMORY, _LEAST = GiB, 64 * MiB


def boot_check(attempt: Attempt, store: Store, artifact: Artifact) -> dict[str, Any]:
    """Restore the disks to scratch files, every byte verified, boot them, and tell what was seen.

    Raises CorruptImage where the BIOS finds nothing to boot, ConfigError where QEMU is missing or fails, StoreFull
    where the scratch directory is too small, and as a restore does.
    """
    tool("qemu-system-x86_64", "qemu-system-x86")
    parent = attempt.boots.folder
    if parent is None:
        raise ConfigError("This worker has no directory to boot copies in", "boot.dir", "Set it")
    disks = read_backup(attempt, store, artifact)
    config = _config(store, disks[0].manifest)
    parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parent, _PREFIX) as folder:
        attempt.progress.start("restoring to boot", sum(disk.total("qcow2") for disk in disks))
        drives = [Drive(_restored(disk, folder), _controller(config, disk)) for disk in disks[:MOST_DISKS]]
        attempt.progress.start("booting")
        firmware = str(config.get("firmware") or "bios")
        machine = BootMachine(drives, _memory(config, attempt.boots.memory), firmware, attempt.boots.accelerator)
        seen = boot(machine, folder, BootTimeouts(attempt.boots.seconds, attempt.boots.still_s), attempt.check)
    kept = _keep(screenshot_path(parent, artifact), seen)
    if not seen.bootable:
        raise CorruptImage(
            "The BIOS finds nothing to boot on the disks",
            f"{store.name}:{artifact.prefix}",
            f"Look at the screen, {kept}. A VM that boots from elsewhere is no loss: verify it without boot",
        )
    return _told(seen, machine, kept)


def _restored(disk: BackupDisk, folder: Path) -> Path:
    """A disk as a qcow2, as large as what it holds."""
    hasher, name = Hasher(), f"disk{disk.number}"
    hint = int(disk.entry.facts.get("populated", disk.capacity)) + disk.capacity // 1024 + MiB
    with FileStore("scratch", folder).writer(name, hint, owner=disk.attempt.owner) as sink:
        verify = partial(disk.verify_copy, "qcow2", hasher)
        store_stream(disk.image("qcow2", name), {"scratch": sink}, verify=verify, check=disk.attempt.check)
    return folder / name


def _keep(path: Path, seen: BootOutcome) -> Path:
    """The screenshot, in place of that of an earlier time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_bytes(seen.picture.png())
    return new.replace(path)


def _told(seen: BootOutcome, machine: BootMachine, kept: Path) -> dict[str, Any]:
    return {
        "screenshot": str(kept),
        "screen": seen.screen,
        "width": seen.picture.width,
        "height": seen.picture.height,
        "seconds": seen.seconds,
        "events": list(seen.events),
        "disks": len(machine.drives),
        "firmware": machine.firmware,
        "memory": machine.memory,
        "accelerator": "kvm" if seen.kvm else "tcg",
        **({"kvm_failure": seen.kvm_failure} if seen.kvm_failure else {}),
    }


# What the VM was.


def _config(store: Store, manifest: Manifest) -> dict[str, Any]:
    """The configuration that is stored beside the disks; empty where there is none that can be read."""
    entry = next((each for each in manifest.entries if each.role == "config"), None)
    try:
        found = json.loads(read_bytes(store, manifest.artifact.key(entry.name))) if entry else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("hardware", {}), dict) else {}


def _memory(config: dict[str, Any], most: int) -> int:
    hardware = config.get("hardware") or {}
    given = hardware.get("memoryMB")
    had = given * MiB if isinstance(given, int) and given > 0 else _MEMORY
    return max(_LEAST, min(had, most))


def _controller(config: dict[str, Any], disk: BackupDisk) -> str:
    """The class of the disk's controller in vSphere; empty where that is not known."""
    devices = {each.get("key"): each for each in (config.get("hardware") or {}).get("device") or []}
    own = devices.get(disk.entry.facts.get("disk")) or {}
    return str((devices.get(own.get("controllerKey")) or {}).get("_vimtype", "")).rpartition(".")[2]
