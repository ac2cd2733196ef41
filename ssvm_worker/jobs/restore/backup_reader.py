"""The disks of a stored backup: search by name, and readers that compare every byte with the manifest."""

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

#: The image formats of a restored disk.
FORMATS = ("raw", "qcow2", "vmdk")


@dataclass(frozen=True)
class BackupDisk:
    """One disk of a backup. Each method reads it from the start. The data is verified only at the end of a stream."""

    attempt: Attempt
    store: Store
    manifest: Manifest
    entry: Entry
    #: Number of the disk in the backup, from 0.
    number: int

    @property
    def capacity(self) -> int:
        """Return the bytes of the disk."""
        return int(self.entry.facts["virtual_size"])

    @property
    def label(self) -> str:
        """Return the disk's label in the vSphere Client, or the object's name."""
        return str(self._described.get("label", self.entry.name))

    @property
    def names(self) -> list[str]:
        """Return all names that a request may use, in lower case."""
        described = (str(self._described.get(each, "")).lower() for each in ("key", "label", "place"))
        return [str(self.number), self.entry.name.lower(), *filter(None, described)]

    @property
    def where(self) -> str:
        """Return the object's location for messages."""
        return f"{self.store.name}:{self.key}"

    @property
    def key(self) -> str:
        """Return the object's key on its store."""
        return self.manifest.artifact.key(self.entry.name)

    @property
    def file(self) -> str:
        """Return the file name in the OVF descriptor."""
        return f"{self.entry.name.rpartition('.')[0]}.vmdk"

    def stream_size(self) -> int:
        """Return the bytes of the disk as "vmdk". For a disk in grains, read its map and the indexes of its packs."""
        if not self.in_grains:
            return self.entry.size
        found = grains.lengths(self.store, self.manifest, self.entry)
        return stream_size(found, self.capacity, self._grain_size)

    def extents(self) -> Iterator[Extent]:
        """Yield the disk's data. Raises CorruptImage or ChecksumMismatch at the end of the data at the latest."""
        if self.in_grains:
            return self._count_progress(grains.extents(self.store, self.manifest, self.entry, self.attempt.wait))
        stored = checked(self.attempt, self.store, self.key, self.entry)
        return self._count_progress(vmdk_extents(stored, self.where, self.capacity))

    def image(self, format_: str, name: str) -> Iterator[bytes]:
        """Yield the chunks of an image of the disk in one of FORMATS. *name* is the name of the new file.

        The caller must hash the chunks and call ``verify_copy`` before the commit, so that they are hashed only once.
        """
        if format_ == "raw":
            return raw(self.extents(), self.capacity, self.where)
        if format_ == "qcow2":
            return qcow2(self.extents(), self.capacity, self._clusters(), self.where)
        if self.in_grains:
            found = grains.deflated(self.store, self.manifest, self.entry, self.attempt.wait)
            return stream_of_grains(
                self._count_progress(found, self._grain_size), self.capacity, name, self._grain_size
            )
        return tap(self.attempt.resuming(self.store.reader(self.key)), self.attempt.progress.observe)

    def verify_copy(self, format_: str, hasher: Hasher) -> None:
        """Raise ChecksumMismatch if an image that is a copy of the object differs from the manifest."""
        if format_ == "vmdk" and not self.in_grains:
            _require_digest(hasher, self.entry, self.where)

    def total(self, format_: str) -> int:
        """Return the progress total of an image: the bytes of the disk, or of the object for a copy."""
        return self.capacity if self.in_grains or format_ != "vmdk" else self.entry.size

    def _count_progress(self, extents: Iterator[Extent], step: int | None = None) -> Iterator[Extent]:
        """Pass extents and report the position on the disk as progress.

        *step* is the number of the disk's bytes per extent, if it is not the length of the data.
        """
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
        """Return whether the disk is stored as grains. Its streamOptimized VMDK is then built again."""
        return self.entry.role == GRAIN_MAP

    @property
    def _grain_size(self) -> int:
        return grains.open_map(self.store, self.manifest, self.entry).grain_size

    def _clusters(self) -> int:
        """Return the maximum number of clusters of a qcow2 image."""
        if self.in_grains:
            map_ = grains.open_map(self.store, self.manifest, self.entry)
            return most_clusters(map_.capacity, map_.grains * map_.grain_size, map_.grain_size)
        head = b""
        for chunk in self.attempt.resuming(self.store.reader(self.key)):
            head += chunk
            if len(head) >= SECTOR:
                break
        grain = parse_header(head[:SECTOR], self.where).grain_size * SECTOR
        return most_clusters(self.capacity, self.entry.facts.get("populated", self.capacity), grain)


def checked(attempt: Attempt, store: Store, key: str, entry: Entry) -> Iterator[bytes]:
    """Yield the bytes of an object. Raises ChecksumMismatch after the last byte if they differ from the manifest."""
    hasher = Hasher()
    yield from tap(attempt.resuming(store.reader(key)), hasher)
    _require_digest(hasher, entry, f"{store.name}:{key}")


def _require_digest(hasher: Hasher, entry: Entry, where: str) -> None:
    if (hasher.size, str(hasher.digest())) != (entry.size, entry.digest):
        raise ChecksumMismatch(
            f"The stored object is damaged: {hasher.size} bytes with {hasher.digest()} instead of {entry.size} "
            f"with {entry.digest}",
            where,
            "Check the backup with `ssvm verify`; use another store or another backup",
        )


def read_backup(attempt: Attempt, store: Store, artifact: Artifact) -> list[BackupDisk]:
    """Return the disks of a backup in their order. Raises ObjectNotFound if no complete backup exists."""
    manifest = read_manifest(store, artifact)
    found = [each for each in manifest.entries if each.role in ("disk", GRAIN_MAP)]
    if not found:
        raise CorruptImage("The manifest lists no disk", f"{store.name}:{artifact.prefix}", "Use another backup")
    return [BackupDisk(attempt, store, manifest, each, number) for number, each in enumerate(found)]


def select_disk(disks: list[BackupDisk], wanted: str) -> BackupDisk:
    """Return the disk with that number, name, key, label or place. Raises InvalidRequest with a list of the disks."""
    for disk in disks:
        if wanted.strip().lower() in disk.names:
            return disk
    raise InvalidRequest(f"The backup has no disk {wanted!r}", disks[0].manifest.artifact.prefix, listed(disks))


def listed(disks: list[BackupDisk]) -> str:
    """Return the disks with all their names, for a remedy."""
    return "There are: " + "; ".join(" = ".join(disk.names) for disk in disks)
