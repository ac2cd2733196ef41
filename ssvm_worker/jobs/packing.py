"""A backup as one OVA: a tar of its descriptor, its checksums and its files, made as it is read; nothing is kept.

DMTF DSP0243, 8: the descriptor comes first, then the .mf, then the files in the order in which the descriptor names
them. All sizes are in the manifest, so the size of the whole is known before the first byte.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from ssvm_worker.errors import CorruptImage, InvalidRequest
from ssvm_worker.formats import ova
from ssvm_worker.grains.map import ROLE as GRAIN_MAP
from ssvm_worker.keys import Artifact
from ssvm_worker.manifest import Entry, Manifest, read_manifest
from ssvm_worker.stream import CHUNK, Store

from .attempt import Attempt
from .stored import checked

#: A tar ends in two blocks of zeros and is padded to a record of 20 (pax(1), "ustar Interchange Format").
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


@dataclass(frozen=True)
class Package:
    """An OVA that is about to be made."""

    attempt: Attempt
    store: Store
    manifest: Manifest
    #: In the order of the package.
    members: list[Entry]

    @property
    def name(self) -> str:
        """What its file should be called."""
        return f"{self.manifest.artifact.id}.ova"

    @property
    def size(self) -> int:
        """Bytes, exactly."""
        plain = sum(len(_header(each)) + each.size + -each.size % _BLOCK for each in self.members)
        return -(-(plain + 2 * _BLOCK) // _RECORD) * _RECORD

    def chunks(self) -> Iterator[bytes]:
        """The package; ChecksumMismatch at the end of a member that is not what the manifest says."""
        written = 0
        for each in self.members:
            head = _header(each)
            yield head
            yield from checked(self.attempt, self.store, self.manifest.artifact.key(each.name), each)
            if padding := bytes(-each.size % _BLOCK):
                yield padding
            written += len(head) + each.size + len(padding)
        end = self.size - written
        for start in range(0, end, CHUNK):
            yield bytes(min(CHUNK, end - start))


def package(attempt: Attempt, store: Store, artifact: Artifact) -> Package:
    """Find the members of a backup's OVA; nothing but the descriptor is read.

    Raises ObjectNotFound where there is no complete backup, InvalidRequest for an incremental one.
    """
    manifest = read_manifest(store, artifact)
    where = f"{store.name}:{artifact.prefix}"
    if any(each.role == GRAIN_MAP for each in manifest.entries):
        raise InvalidRequest(
            "The backup is incremental: its disks are not stored as files",
            where,
            "Restore it to files first (format vmdk), or take a full backup",
        )
    descriptor, sums = (_of_role(manifest, role, where) for role in ("descriptor", "checksums"))
    text = b"".join(checked(attempt, store, artifact.key(descriptor.name), descriptor))
    listed = ova.read_descriptor(text, where)
    files = [_entry(manifest, name, where) for name in (*listed.disks, *listed.others)]
    return Package(attempt, store, manifest, [descriptor, sums, *files])


def _of_role(manifest: Manifest, role: str, where: str) -> Entry:
    found = next((each for each in manifest.entries if each.role == role), None)
    if found is None:
        raise CorruptImage(f"The backup has no {role}", where, "Upload its disks one by one, or take another backup")
    return found


def _entry(manifest: Manifest, name: str, where: str) -> Entry:
    found = manifest.entry(name)
    if found is None:
        raise CorruptImage(f"The backup has no file {name!r}, which its OVF names", where, "Take another backup")
    return found


def _header(entry: Entry) -> bytes:
    """GNU's form, in which a size may exceed the 8 GiB of ustar."""
    member = tarfile.TarInfo(entry.name)
    member.size, member.mode = entry.size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)
