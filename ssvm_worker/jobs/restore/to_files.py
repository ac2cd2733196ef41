"""Restore disks of a backup as image files on stores: a template, or a directory of volumes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, find_manifest
from ssvm_worker.artifacts.manifest import discard as discard_artifact
from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.cloudstack_properties import properties
from ssvm_worker.jobs.store_set import add_small_objects, find_placement, publish
from ssvm_worker.streaming.interfaces import Observer, Sink, Store
from ssvm_worker.streaming.pipeline import StreamResult, store_stream
from ssvm_worker.units import MiB

from .backup_reader import BackupDisk


@dataclass(frozen=True)
class FileTarget:
    """The target of a restore to files."""

    artifact: Artifact
    #: raw | qcow2 | vmdk
    format: str
    #: The display name.
    name: str
    #: Names of stores; the first is the primary.
    stores: list[str]


def restore_files(target: FileTarget, attempt: Attempt, disks: list[BackupDisk]) -> dict[str, Any]:
    """Store an image of each disk, then the properties and the manifest."""
    stores = {name: attempt.store(name) for name in target.stores}
    # The data that distinguishes this restore from another one to the same target.
    origin = {
        "backup": disks[0].manifest.artifact.prefix,
        "format": target.format,
        "disks": {disk.entry.name: disk.entry.digest for disk in disks},
    }
    if done := _already_there(target.artifact, origin, stores, attempt):
        return done
    for store in stores.values():
        # This job holds the artifact's lock, so any uncommitted data is from an earlier attempt.
        discard_artifact(store, target.artifact, attempt.confirm)
    attempt.progress.start("restoring", sum(disk.total(target.format) for disk in disks))
    manifest = Manifest(target.artifact, attempt.job_id, source=origin, facts={"name": target.name})
    owed: dict[str, WorkerError] = {}
    for disk in disks:
        number = "" if len(disks) == 1 else f"-disk{disk.number}"
        name = f"{target.artifact.id}{number}.{target.format}"
        entry, stored = _one_disk(target, disk, name, {key: stores[key] for key in stores if key not in owed})
        manifest = manifest.with_entry(entry)
        owed |= stored.owed
    small = properties(target, manifest) if len(disks) == 1 else {}
    manifest = add_small_objects(manifest, small, "properties")
    done = publish(attempt, stores, StreamResult(owed=owed), manifest, small)
    for name in done["owed"]:
        try:
            discard_artifact(stores[name], target.artifact, attempt.confirm)
        except WorkerError as error:
            what = "store %s keeps its data of %s until the copy job runs: %s"
            attempt.log.info(what, name, target.artifact.prefix, error)
    return _result(manifest) | done | {"reused": False}


def _already_there(
    target: Artifact, origin: dict[str, Any], stores: dict[str, Store], attempt: Attempt
) -> dict[str, Any] | None:
    """Return the result of an earlier job that made this target, or None.

    Raises InvalidRequest if the target contains something else.
    """
    primary = next(iter(stores.values()))
    manifest = find_manifest(primary, target)
    if manifest is None:
        return None
    if manifest.source != origin:
        raise InvalidRequest(
            f"Another {target.kind} exists already",
            f"{primary.name}:{target.prefix}",
            "Delete it first (`ssvm delete`), or restore to a new id",
        )
    return _result(manifest) | find_placement(attempt, stores, target) | {"reused": True}


def _one_disk(target: FileTarget, disk: BackupDisk, name: str, stores: dict[str, Store]) -> tuple[Entry, StreamResult]:
    attempt, hasher = disk.attempt, Hasher()

    def verify() -> None:
        disk.verify_copy(target.format, hasher)
        attempt.confirm()

    with ExitStack() as stack:
        sinks: dict[str, Sink] = {
            label: stack.enter_context(store.writer(target.artifact.key(name), _hint(store, disk), owner=attempt.owner))
            for label, store in stores.items()
        }
        chunks = disk.image(target.format, name)
        observers: list[Observer] = [hasher, attempt.held.took]
        min_rate = attempt.settings.worker.min_store_rate or 0
        stored = store_stream(chunks, sinks, observers, verify=verify, check=attempt.check, min_rate=min_rate)
    facts = {"format": target.format, "virtual_size": disk.capacity, "disk": disk.entry.name}
    return Entry(name, hasher.size, str(hasher.digest()), "image", facts), stored


def _hint(store: Store, disk: BackupDisk) -> int | None:
    """Return the maximum bytes of an image for a store that does not report its free space, otherwise None.

    Other stores get no hint, because a thin disk would then reserve too much space.
    The maximum allows for deflated grains, which grow by at most 0.8 %, and for the tables of a format.
    """
    return None if store.usage().free is not None else disk.capacity + disk.capacity // 64 + MiB


def _result(manifest: Manifest) -> dict[str, Any]:
    disks = [each for each in manifest.entries if each.role == "image"]
    return {
        "key": manifest.artifact.prefix,
        "size": manifest.size,
        "virtual_size": sum(each.facts["virtual_size"] for each in disks),
        "format": disks[0].facts["format"],
        "disks": [
            {"key": manifest.artifact.key(each.name), "size": each.size, "digest": each.digest} for each in disks
        ],
        "objects": [each.name for each in manifest.entries],
    }
