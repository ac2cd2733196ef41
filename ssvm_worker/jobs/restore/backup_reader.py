"""The disks of a stored backup: found by name, and read with every byte checked against the manifest on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, read_manifest
from ssvm_worker.errors import ChecksumMismatch, CorruptImage, InvalidRequest
from ssvm_worker.formats.extents import Extent, vmdk_extents
from ssvm_worker.formats.vmdk import SECTOR, parse_header
from ssvm_worker.formats.writers.qcow2 import most_clusters, qcow2
from ssvm_worker.formats.writers.raw import raw
from ssvm_worker.formats.writers.vmdk import stream_of_grains, stream_size
from ssvm_worker.grain_store import reader as grains
from ssvm_worker.grain_store.map import ROLE as GRAIN_MAP
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import tap

#: The images that a disk can be restored as.
FORMATS = ("raw", "qcow2", "vmdk")


@dataclass(frozen=True)
class BackupDisk:
    """One disk of a backup. Each method reads it anew; judge what came of it only when the stream has ended."""

    attempt: Attempt
    store: Store
    manifest: Manifest
    entry: Entry
    #: Its place among the disks of the backup, from 0.
    number: int

    @property
    def capacity(self) -> int:
        """Bytes of the disk."""
        return int(self.entry.facts["virtual_size"])

    @property
    def label(self) -> str:
        """What the vSphere Client called it, or the object's name."""
        return str(self._described.get("label", self.entry.name))

    @property
    def names(self) -> list[str]:
        """All that a request may call it by, in lower case."""
        described = (str(self._described.get(each, "")).lower() for each in ("key", "label", "place"))
        return [str(self.number), self.entry.name.lower(), *filter(None, described)]

    @property
    def where(self) -> str:
        """The object, for messages."""
        return f"{self.store.name}:{self.key}"

    @property
    def key(self) -> str:
        """The object's key on its store."""
        return self.manifest.artifact.key(self.entry.name)

    @property
    def file(self) -> str:
        """What the OVF descriptor calls its file."""
        return f"{self.entry.name.rpartition('.')[0]}.vmdk"

    def stream_size(self) -> int:
        """Bytes of the image "vmdk"; of a disk in grains by its map and the indexes of its packs, which are read."""
        if not self.in_grains:
            return self.entry.size
        found = grains.lengths(self.store, self.manifest, self.entry)
        return stream_size(found, self.capacity, self._grain_size)

    def extents(self) -> Iterator[Extent]:
        """The disk's data; CorruptImage or ChecksumMismatch at its end at the latest."""
        if self.in_grains:
            return self._told(grains.extents(self.store, self.manifest, self.entry, self.attempt.wait))
        return self._told(vmdk_extents(self._stored(), self.where, self.capacity))

    def image(self, format_: str, name: str) -> Iterator[bytes]:
        """The chunks of an image of the disk in one of FORMATS; *name* is what its file will be called.

        Whoever stores it hashes it, and must call ``refuse_other`` before it is committed: a copy is not hashed twice.
        """
        if format_ == "raw":
            return raw(self.extents(), self.capacity, self.where)
        if format_ == "qcow2":
            return qcow2(self.extents(), self.capacity, self._clusters(), self.where)
        if self.in_grains:
            found = grains.deflated(self.store, self.manifest, self.entry, self.attempt.wait)
            return stream_of_grains(self._told(found, self._grain_size), self.capacity, name, self._grain_size)
        return tap(self.attempt.resuming(self.store.reader(self.key)), self.attempt.progress.saw)

    def refuse_other(self, format_: str, hasher: Hasher) -> None:
        """Raise ChecksumMismatch if an image that is a copy of the object is not what the manifest says."""
        if format_ == "vmdk" and not self.in_grains:
            _refuse_other(hasher, self.entry, self.where)

    def total(self, format_: str) -> int:
        """What the progress of such an image comes to: bytes of the disk, or of the object where that is copied."""
        return self.capacity if self.in_grains or format_ != "vmdk" else self.entry.size

    def _told(self, extents: Iterator[Extent], step: int | None = None) -> Iterator[Extent]:
        """Progress is how far on the disk we are; *step*: bytes of it that each piece stands for, if not its own."""
        seen = 0
        for offset, data in extents:
            now = min(offset + (step or len(data)), self.capacity)
            self.attempt.progress.advance(now - seen)
            seen = now
            yield offset, data
        self.attempt.progress.advance(self.capacity - seen)

    @property
    def _described(self) -> dict[str, Any]:
        disks: list[dict[str, Any]] = self.manifest.facts.get("disks", [])
        return next((each for each in disks if each["key"] == self.entry.facts.get("disk")), {})

    @property
    def in_grains(self) -> bool:
        """Whether it is no file: its streamOptimized VMDK is made anew."""
        return self.entry.role == GRAIN_MAP

    @property
    def _grain_size(self) -> int:
        return grains.open_map(self.store, self.manifest, self.entry).grain_size

    def _stored(self) -> Iterator[bytes]:
        """The object as it lies there, its size and digest checked at the end."""
        return checked(self.attempt, self.store, self.key, self.entry)

    def _clusters(self) -> int:
        if self.in_grains:
            it = grains.open_map(self.store, self.manifest, self.entry)
            return most_clusters(it.capacity, it.grains * it.grain_size, it.grain_size)
        head = b""
        for chunk in self.attempt.resuming(self.store.reader(self.key)):
            head += chunk
            if len(head) >= SECTOR:
                break
        grain = parse_header(head[:SECTOR], self.where).grain_size * SECTOR
        return most_clusters(self.capacity, self.entry.facts.get("populated", self.capacity), grain)


def checked(attempt: Attempt, store: Store, key: str, entry: Entry) -> Iterator[bytes]:
    """The bytes of an object; ChecksumMismatch behind the last one unless they are what the manifest says."""
    hasher = Hasher()
    yield from tap(attempt.resuming(store.reader(key)), hasher)
    _refuse_other(hasher, entry, f"{store.name}:{key}")


def _refuse_other(hasher: Hasher, entry: Entry, where: str) -> None:
    if (hasher.size, str(hasher.digest())) != (entry.size, entry.digest):
        raise ChecksumMismatch(
            f"The stored object is damaged: {hasher.size} bytes with {hasher.digest()} in place of {entry.size} "
            f"with {entry.digest}",
            where,
            "`ssvm verify` looks at all of it; take another store, or another backup",
        )


def read_backup(attempt: Attempt, store: Store, artifact: Artifact) -> list[BackupDisk]:
    """The disks of a backup, in their order; ObjectNotFound where there is no complete one."""
    manifest = read_manifest(store, artifact)
    found = [each for each in manifest.entries if each.role in ("disk", GRAIN_MAP)]
    if not found:
        raise CorruptImage("The manifest lists no disk", f"{store.name}:{artifact.prefix}", "Take another backup")
    return [BackupDisk(attempt, store, manifest, each, number) for number, each in enumerate(found)]


def select_disk(disks: list[BackupDisk], wanted: str) -> BackupDisk:
    """The one disk of that number, name, key, label or place; InvalidRequest lists those there are."""
    for disk in disks:
        if wanted.strip().lower() in disk.names:
            return disk
    raise InvalidRequest(f"The backup has no disk {wanted!r}", disks[0].manifest.artifact.prefix, listed(disks))


def listed(disks: list[BackupDisk]) -> str:
    """The disks and all their names, for a remedy."""
    return "There are: " + "; ".join(" = ".join(disk.names) for disk in disks)
