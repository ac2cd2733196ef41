"""Backups for tests, in the layout of the backup job, from given disks."""

from __future__ import annotations

import random

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.vmware.hardware import Controller, Disk, Hardware, Nic
from ssvm_worker.vmware.ovf import OvfDisk, build, checksums
from tests.images import stream_optimized

BACKUP = Artifact("backup", "acme", "b1", "vol1")
_CONTROLLER = Controller(1000, "ParaVirtualSCSIController", 0)


def content(size: int, seed: int = 1) -> bytes:
    """Return a disk with a half of zeros: some at its start, some at its end."""
    return (bytes(size // 4) + random.Random(seed).randbytes(size // 2)).ljust(size, b"\0")


def store_backup(store: Store, *raws: bytes, artifact: Artifact = BACKUP) -> Manifest:
    """Store a full backup of a VM with these disks (scsi0:0, scsi0:1, …), and return its manifest."""
    disks = [
        Disk(2000 + number, f"Hard disk {number + 1}", len(raw), _CONTROLLER, number) for number, raw in enumerate(raws)
    ]
    streams = [stream_optimized(raw) for raw in raws]
    names = [f"{artifact.id}-disk{number}.vmdk" for number in range(len(raws))]
    hardware = Hardware(
        name="web", guest_id="otherLinux64Guest", version="vmx-19", firmware="bios", cpus=2, memory_mib=512,
        controllers=(_CONTROLLER,), disks=tuple(disks), nics=(Nic("VirtualVmxnet3", "VM Network"),),
    )  # fmt: skip
    parts = [
        OvfDisk(disk, name, len(stream), len(raw), f"/vm-1/ParaVirtualSCSIController0:{disk.unit}")
        for disk, name, stream, raw in zip(disks, names, streams, raws, strict=True)
    ]
    descriptor = build(hardware, parts)
    objects = {f"{artifact.id}.ovf": descriptor} | dict(zip(names, streams, strict=True))
    sums = checksums([(name, digest_of(data).hex) for name, data in objects.items()])
    entries = [
        Entry(name, len(stream), str(digest_of(stream)), "disk", _facts(disk, raw))
        for disk, name, stream, raw in zip(disks, names, streams, raws, strict=True)
    ]
    entries.append(Entry(f"{artifact.id}.ovf", len(descriptor), str(digest_of(descriptor)), "descriptor"))
    entries.append(Entry(f"{artifact.id}.mf", len(sums), str(digest_of(sums)), "checksums"))
    described = [{"key": each.key, "label": each.label, "place": each.place, "status": "exported"} for each in disks]
    facts = {"vm_name": "web", "virtual_size": sum(map(len, raws)), "complete": True, "disks": described}
    manifest = Manifest(artifact, "backup-job", tuple(entries), facts=facts)
    for name, data in (objects | {f"{artifact.id}.mf": sums}).items():
        put_bytes(store, artifact.key(name), data, Owner("backup-job"))
    write_manifest(store, manifest, Owner("backup-job"))
    return manifest


def _facts(disk: Disk, raw: bytes) -> dict[str, object]:
    grain = 64 * 1024
    grains = (raw[at : at + grain] for at in range(0, len(raw), grain))
    populated = sum(len(each) for each in grains if any(each))
    return {"format": "vmdk", "virtual_size": disk.capacity, "disk": disk.key, "populated": populated}
