"""What must hold in a backup besides digests: each disk's structure, and that OVF, .mf and manifest agree."""

from __future__ import annotations

from ssvm_worker.artifacts.manifest import Entry, Manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.formats import ova
from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.grain_store.map import ROLE as GRAIN_MAP
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes


class Structure:
    """An observer of the chunks of one object: nothing for what is no disk of a backup."""

    def __init__(self, manifest: Manifest, entry: Entry) -> None:
        self._verifier: StreamOptimized | None = None
        self._error: CorruptImage | None = None
        if manifest.artifact.kind == "backup" and entry.role == "disk":
            self._verifier = StreamOptimized(entry.name, entry.facts.get("virtual_size"))

    def __call__(self, chunk: bytes) -> None:
        """See the next bytes; an error is kept, so that the digest is computed all the same."""
        if self._verifier is not None and self._error is None:
            try:
                self._verifier(chunk)
            except CorruptImage as error:
                self._error = error

    def finding(self) -> str:
        """What is wrong with the structure; empty if nothing is."""
        if self._verifier is not None and self._error is None:
            try:
                self._verifier.finish()
            except CorruptImage as error:
                self._error = error
        return self._error.what if self._error else ""


def contradictions(store: Store, manifest: Manifest) -> list[str]:
    """What the OVF descriptor and the .mf of a backup say against its manifest; both are known to be as stored."""
    if manifest.artifact.kind != "backup":
        return []
    try:
        return [*_of_descriptor(store, manifest), *_of_checksums(store, manifest)]
    except CorruptImage as error:
        return [str(error)]


def _of_descriptor(store: Store, manifest: Manifest) -> list[str]:
    key, data = _text(store, manifest, "descriptor")
    named = ova.read_descriptor(data, key)
    sizes = ova.read_sizes(data, key)
    found = []
    for name in (*named.disks, *named.others):
        entry = manifest.entry(name)
        if entry is None and not _in_grains(manifest, name):
            found.append(f"{key} names {name}, which is not stored")
        if entry is not None and sizes.get(name, entry.size) != entry.size:
            found.append(f"{key} says that {name} has {sizes[name]} bytes in place of {entry.size}")
    stored = [each.name for each in manifest.entries if each.role == "disk"]
    return found + [f"{key} does not name {name}" for name in stored if name not in named.disks]


def _of_checksums(store: Store, manifest: Manifest) -> list[str]:
    key, data = _text(store, manifest, "checksums")
    found = []
    for name, digest in ova.read_checksums(data, key).items():
        entry = manifest.entry(name)
        if entry is None and not _in_grains(manifest, name):
            found.append(f"{key} names {name}, which is not stored")
        if entry is not None and str(digest) != entry.digest:
            found.append(f"{key} gives {name} {digest} in place of {entry.digest}")
    return found


def _text(store: Store, manifest: Manifest, role: str) -> tuple[str, bytes]:
    """Where the backup's one object of that role is, and its bytes."""
    entry = next((each for each in manifest.entries if each.role == role), None)
    if entry is None:
        raise CorruptImage(f"The backup has no {role}", f"{store.name}:{manifest.artifact.prefix}")
    key = manifest.artifact.key(entry.name)
    return f"{store.name}:{key}", read_bytes(store, key, ova.MAX_TEXT)


def _in_grains(manifest: Manifest, name: str) -> bool:
    """Whether that is the file which a disk stored in grains would be."""
    stem = name.rpartition(".")[0]
    return any(each.role == GRAIN_MAP and each.name.rpartition(".")[0] == stem for each in manifest.entries)
