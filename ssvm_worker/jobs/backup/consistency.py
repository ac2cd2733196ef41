"""Checks of a backup beyond its digests: lost disks, the structure of disks, and agreement of OVF, .mf and manifest."""

from __future__ import annotations

from typing import Any

from ssvm_worker.artifacts.manifest import Entry, Manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.formats import ova
from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.grain_store.map import ROLE as GRAIN_MAP
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.vmware.hardware import INDEPENDENT, MISSING, RDM


def lost_disks(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the manifest's description of each requested disk that the backup lacks.

    If the request lists disks, the disks that it does not list are not lost.
    """
    requested = (manifest.source.get("request") or {}).get("disks")
    lost = (MISSING,) if requested else (MISSING, INDEPENDENT, RDM)
    return [each for each in manifest.facts.get("disks", []) if each["status"] in lost]


class Structure:
    """An observer that checks the structure of one object. It checks only disks of backups."""

    def __init__(self, manifest: Manifest, entry: Entry) -> None:
        self._verifier: StreamOptimized | None = None
        self._error: CorruptImage | None = None
        if manifest.artifact.kind == "backup" and entry.role == "disk":
            self._verifier = StreamOptimized(entry.name, entry.facts.get("virtual_size"))

    def __call__(self, chunk: bytes) -> None:
        """Check the next bytes. An error is kept for ``finding``, so that the caller can finish the digest."""
        if self._verifier is not None and self._error is None:
            try:
                self._verifier(chunk)
            except CorruptImage as error:
                self._error = error

    def finding(self) -> str:
        """Return the defect of the structure, or an empty string."""
        if self._verifier is not None and self._error is None:
            try:
                self._verifier.finish()
            except CorruptImage as error:
                self._error = error
        return self._error.what if self._error else ""


def contradictions(store: Store, manifest: Manifest) -> list[str]:
    """Return the contradictions between the manifest of a backup and its OVF descriptor and .mf.

    The caller must have verified the digests of both files.
    """
    if manifest.artifact.kind != "backup":
        return []
    try:
        return [*_in_descriptor(store, manifest), *_in_checksums(store, manifest)]
    except CorruptImage as error:
        return [str(error)]


def _in_descriptor(store: Store, manifest: Manifest) -> list[str]:
    key, data = _text(store, manifest, "descriptor")
    named = ova.read_descriptor(data, key)
    sizes = ova.read_sizes(data, key)
    found = []
    for name in (*named.disks, *named.others):
        entry = manifest.entry(name)
        if entry is None and not _in_grains(manifest, name):
            found.append(f"{key} names {name}, which is not stored")
        if entry is not None and sizes.get(name, entry.size) != entry.size:
            found.append(f"{key} says that {name} has {sizes[name]} bytes instead of {entry.size}")
    stored = [each.name for each in manifest.entries if each.role == "disk"]
    return found + [f"{key} does not name {name}" for name in stored if name not in named.disks]


def _in_checksums(store: Store, manifest: Manifest) -> list[str]:
    key, data = _text(store, manifest, "checksums")
    found = []
    for name, digest in ova.read_checksums(data, key).items():
        entry = manifest.entry(name)
        if entry is None and not _in_grains(manifest, name):
            found.append(f"{key} names {name}, which is not stored")
        if entry is not None and str(digest) != entry.digest:
            found.append(f"{key} gives {name} {digest} instead of {entry.digest}")
    return found


def _text(store: Store, manifest: Manifest, role: str) -> tuple[str, bytes]:
    """Return location and content of the backup's object with a role."""
    entry = next((each for each in manifest.entries if each.role == role), None)
    if entry is None:
        raise CorruptImage(f"The backup has no {role}", f"{store.name}:{manifest.artifact.prefix}")
    key = manifest.artifact.key(entry.name)
    return f"{store.name}:{key}", read_bytes(store, key, ova.MAX_TEXT)


def _in_grains(manifest: Manifest, name: str) -> bool:
    """Return whether *name* is the file name of a disk that is stored as grains."""
    stem = name.rpartition(".")[0]
    return any(each.role == GRAIN_MAP and each.name.rpartition(".")[0] == stem for each in manifest.entries)
