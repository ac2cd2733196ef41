"""A backup as one OVA: a tar of its descriptor, its checksums and its files, made as it is read; nothing is kept.

DMTF DSP0243, 5.3: the descriptor comes first, then the .mf, then the files in the order in which the descriptor names
them; or the .mf comes last. All sizes are known before the first byte: those of a full backup by its manifest, those of
disks in grains by their maps. The digests of the latter are not, so the .mf of an incremental backup comes last.
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

#: A tar ends in two blocks of zeros and is padded to a record of 20 (pax(1), "ustar Interchange Format").
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_ANY = digest_of(b"")


@dataclass(frozen=True)
class OvaMember:
    """A file of a package, by what its header says."""

    name: str
    size: int
    #: Makes its bytes; called when those before it have gone.
    chunks: Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class OvaExport:
    """An OVA that is about to be made."""

    artifact: Artifact
    #: In the order of the package.
    members: list[OvaMember]

    @property
    def name(self) -> str:
        """What its file should be called."""
        return f"{self.artifact.id}.ova"

    @property
    def size(self) -> int:
        """Bytes, exactly."""
        plain = sum(len(_header(each)) + each.size + -each.size % _BLOCK for each in self.members)
        return -(-(plain + 2 * _BLOCK) // _RECORD) * _RECORD

    def chunks(self) -> Iterator[bytes]:
        """The package; ChecksumMismatch or CorruptImage in a member that is not what the manifest says."""
        written = 0
        for each in self.members:
            head = _header(each)
            yield head
            yield from each.chunks()
            if padding := bytes(-each.size % _BLOCK):
                yield padding
            written += len(head) + each.size + len(padding)
        end = self.size - written
        for start in range(0, end, CHUNK):
            yield bytes(min(CHUNK, end - start))


def package(attempt: Attempt, store: Store, artifact: Artifact) -> OvaExport:
    """Find the members of a backup's OVA; read are the descriptor and, of disks in grains, maps and indexes.

    Raises ObjectNotFound where there is no complete backup.
    """
    manifest = read_manifest(store, artifact)
    where = f"{store.name}:{artifact.prefix}"
    descriptor, sums = (_of_role(manifest, role, where) for role in ("descriptor", "checksums"))
    text = b"".join(checked(attempt, store, artifact.key(descriptor.name), descriptor))
    listed = ova.read_descriptor(text, where)
    in_grains = {disk.file: disk for disk in read_backup(attempt, store, artifact) if disk.in_grains}
    names = (*listed.disks, *listed.others)
    entries = {name: _entry(manifest, name, where) for name in names if name not in in_grains}
    stored = {each.name: _stored(attempt, store, manifest, each) for each in (descriptor, sums, *entries.values())}
    if not in_grains:
        return OvaExport(artifact, list(stored.values()))
    digests = {each.name: parse_checksum(each.digest) for each in entries.values()}
    made = {name: _made(disk, digests) for name, disk in in_grains.items() if name in names}
    text = ova.resized(text, {each.name: each.size for each in made.values()}, where)
    digests[descriptor.name] = digest_of(text)
    head = OvaMember(descriptor.name, len(text), lambda: iter([text]))
    files = [head, *((stored | made)[name] for name in names)]
    return OvaExport(artifact, [*files, _checksums(sums.name, [each.name for each in files], digests)])


def _stored(attempt: Attempt, store: Store, manifest: Manifest, entry: Entry) -> OvaMember:
    key = manifest.artifact.key(entry.name)
    return OvaMember(entry.name, entry.size, partial(checked, attempt, store, key, entry))


def _made(disk: BackupDisk, digests: dict[str, Digest]) -> OvaMember:
    """A disk in grains as a stream; its digest is known when it has passed."""

    def chunks() -> Iterator[bytes]:
        hasher = Hasher()
        yield from tap(disk.image("vmdk", disk.file), hasher)
        digests[disk.file] = hasher.digest()

    return OvaMember(disk.file, disk.stream_size(), chunks)


def _checksums(name: str, files: list[str], digests: Mapping[str, Digest]) -> OvaMember:
    """The .mf behind the files, by the digests that are known by then; its size is the same whatever they are."""
    size = len(ova.write_checksums(dict.fromkeys(files, _ANY)))
    return OvaMember(name, size, lambda: iter([ova.write_checksums({each: digests[each] for each in files})]))


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


def _header(member: OvaMember) -> bytes:
    """GNU's form, in which a size may exceed the 8 GiB of ustar."""
    head = tarfile.TarInfo(member.name)
    head.size, head.mode = member.size, 0o644
    return head.tobuf(tarfile.GNU_FORMAT)
