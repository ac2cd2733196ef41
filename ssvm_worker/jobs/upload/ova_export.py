"""Stream a backup as one OVA: a tar archive of its descriptor, its checksums and its files. Nothing is stored.

DMTF DSP0243, 5.3: the descriptor is first, then the .mf, then the files in the order of the descriptor. Or the .mf is
last. All sizes are known before the first byte: from the manifest of a full backup, and from the grain maps of an
incremental backup. The digests of its disks are not known, so the .mf of an incremental backup is last.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from ssvm_worker.artifacts.checksums import Digest, Hasher, digest_of, parse_checksum
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, read_manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.formats import ova
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.restore.backup_reader import BackupDisk, checked, read_backup
from ssvm_worker.streaming.interfaces import CHUNK, Store
from ssvm_worker.streaming.pipeline import tap

#: A tar archive ends with two zero blocks and fills a record of 20 blocks (pax(1), "ustar Interchange Format").
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
#: A digest of the right length.
_PLACEHOLDER = digest_of(b"")


@dataclass(frozen=True)
class OvaMember:
    """A file in an OVA: the values of its tar header, and its bytes."""

    name: str
    size: int
    #: Returns the bytes. Called when the reader has taken all earlier members.
    chunks: Callable[[], Iterator[bytes]]

    def header(self) -> bytes:
        """Return the tar header in GNU's format, in which a size may exceed the 8 GiB of ustar."""
        header = tarfile.TarInfo(self.name)
        header.size, header.mode = self.size, 0o644
        return header.tobuf(tarfile.GNU_FORMAT)


@dataclass(frozen=True)
class OvaExport:
    """The plan of an OVA."""

    artifact: Artifact
    #: The members in the order of the archive.
    members: list[OvaMember]

    @property
    def name(self) -> str:
        """Return a name for the file."""
        return f"{self.artifact.id}.ova"

    @property
    def size(self) -> int:
        """Return the exact size in bytes."""
        unpadded = sum(len(each.header()) + each.size + -each.size % _BLOCK for each in self.members)
        return -(-(unpadded + 2 * _BLOCK) // _RECORD) * _RECORD

    def chunks(self) -> Iterator[bytes]:
        """Yield the archive. Raise ChecksumMismatch or CorruptImage in a member that differs from the manifest."""
        written = 0
        for each in self.members:
            header = each.header()
            yield header
            yield from each.chunks()
            if padding := bytes(-each.size % _BLOCK):
                yield padding
            written += len(header) + each.size + len(padding)
        end = self.size - written
        for start in range(0, end, CHUNK):
            yield bytes(min(CHUNK, end - start))


def plan_ova(attempt: Attempt, store: Store, artifact: Artifact) -> OvaExport:
    """Find the members of a backup's OVA.

    This reads the descriptor, and the maps and indexes of incremental disks.
    Raises ObjectNotFound if there is no complete backup. Raises CorruptImage if a file of the OVF is missing.
    """
    manifest = read_manifest(store, artifact)
    location = f"{store.name}:{artifact.prefix}"
    descriptor, sums = (_find_role(manifest, role, location) for role in ("descriptor", "checksums"))
    text = b"".join(checked(attempt, store, artifact.key(descriptor.name), descriptor))
    listed = ova.read_descriptor(text, location)
    in_grains = {disk.file: disk for disk in read_backup(attempt, store, artifact) if disk.in_grains}
    names = (*listed.disks, *listed.others)
    entries: dict[str, Entry] = {}
    for name in names:
        if name not in in_grains:
            entry = manifest.entry(name)
            if entry is None:
                what = f"The backup has no file {name!r}, which its OVF names"
                raise CorruptImage(what, location, "Take another backup")
            entries[name] = entry
    stored = {
        each.name: OvaMember(each.name, each.size, partial(checked, attempt, store, artifact.key(each.name), each))
        for each in (descriptor, sums, *entries.values())
    }
    if not in_grains:
        return OvaExport(artifact, list(stored.values()))
    digests = {each.name: parse_checksum(each.digest) for each in entries.values()}
    disks = {name: _disk_member(disk, digests) for name, disk in in_grains.items() if name in names}
    text = ova.resized(text, {each.name: each.size for each in disks.values()}, location)
    digests[descriptor.name] = digest_of(text)
    first = OvaMember(descriptor.name, len(text), lambda: iter([text]))
    files = [first, *((stored | disks)[name] for name in names)]
    return OvaExport(artifact, [*files, _checksum_member(sums.name, [each.name for each in files], digests)])


def _disk_member(disk: BackupDisk, digests: dict[str, Digest]) -> OvaMember:
    """Return the stream of an incremental disk. It adds its digest to *digests* when all bytes have passed."""

    def chunks() -> Iterator[bytes]:
        hasher = Hasher()
        yield from tap(disk.image("vmdk", disk.file), hasher)
        digests[disk.file] = hasher.digest()

    return OvaMember(disk.file, disk.stream_size(), chunks)


def _checksum_member(name: str, files: list[str], digests: Mapping[str, Digest]) -> OvaMember:
    """Return the .mf after the files. It reads *digests* at the end. All digests have the same length."""
    size = len(ova.write_checksums(dict.fromkeys(files, _PLACEHOLDER)))
    return OvaMember(name, size, lambda: iter([ova.write_checksums({each: digests[each] for each in files})]))


def _find_role(manifest: Manifest, role: str, location: str) -> Entry:
    found = next((each for each in manifest.entries if each.role == role), None)
    if found is None:
        remedy = "Upload its disks one by one, or take another backup"
        raise CorruptImage(f"The backup has no {role}", location, remedy)
    return found
