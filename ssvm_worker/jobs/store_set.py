"""The stores of one artifact: write its objects to them, and at the end its manifest.

The primary store must accept the artifact. A secondary store may fail, and is then owed the artifact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, discard, read_manifest, write_manifest
from ssvm_worker.errors import Cancelled, ObjectNotFound, StoreUnavailable, WorkerError
from ssvm_worker.streaming.disk_buffer import DiskBuffer
from ssvm_worker.streaming.interfaces import Sink, Store
from ssvm_worker.streaming.pipeline import SlowSinkDetector, StreamResult, put_bytes
from ssvm_worker.units import MiB

from .attempt import Attempt
from .usage import record_usage

if TYPE_CHECKING:
    from ssvm_worker.vmware.hardware import Disk

MakeSink = Callable[[Store], Sink]


class StoreSet:
    """The stores to which a job writes the objects of one artifact. Several threads may share it.

    *disk_buffer* is the directory and the size in bytes of the scratch file in front of each sink. None: no file.
    """

    def __init__(
        self,
        attempt: Attempt,
        artifact: Artifact,
        stores: Mapping[str, Store],
        disk_buffer: tuple[Path, int] | None = None,
    ) -> None:
        self.stores = stores
        self.primary = next(iter(stores.values()))
        #: The largest chunk in bytes that suits all stores.
        self.chunk_size = min(store.chunk_size for store in stores.values())
        #: The failed stores, with their errors.
        self.owed: dict[str, WorkerError] = {}
        self._attempt = attempt
        self._artifact = artifact
        self._disk_buffer = disk_buffer

    def active(self) -> list[Store]:
        """Return the stores that have not failed, the primary first."""
        return [store for store in self.stores.values() if store.name not in self.owed]

    def secondary_may_fail(self, store: Store, step: Callable[[], object]) -> None:
        """Run a step on a store. If a secondary store fails, record that it is owed the artifact."""
        try:
            step()
        except WorkerError as error:
            if store is self.primary or isinstance(error, Cancelled):
                raise
            self.owed[store.name] = error

    def sweep(self, spare: str = "") -> None:
        """Remove uncommitted writes of earlier attempts. This is safe because this job holds the artifact's lock.

        On the primary the writes of the job *spare* stay, because this attempt resumes them. A secondary store that
        fails here is not owed the artifact: clean-up removes the rest later.
        """
        for store in self.stores.values():
            spared = spare if store is self.primary else ""
            try:
                store.sweep(0, self._artifact.prefix, spare=spared)
            except WorkerError as error:
                if store is self.primary or isinstance(error, Cancelled):
                    raise

    def discard(self) -> None:
        """Remove everything that an unfinished backup left."""
        for store in self.stores.values():
            self.secondary_may_fail(store, partial(discard, store, self._artifact, self._attempt.confirm))

    def has(self, entry: Entry) -> bool:
        """Return whether the primary has that object. A secondary store without the object is owed the backup."""
        key = self._artifact.key(entry.name)

        def is_on(store: Store) -> bool:
            try:
                return store.stat(key).size == entry.size
            except ObjectNotFound:
                return False

        def require(store: Store) -> None:
            if not is_on(store):
                raise StoreUnavailable("The store lacks a disk of an earlier attempt", f"{store.name}:{entry.name}")

        if not is_on(self.primary):
            return False
        for store in list(self.stores.values())[1:]:
            self.secondary_may_fail(store, partial(require, store))
        return True

    def put(self, name: str, data: bytes) -> None:
        """Store a small object."""
        key, owner = self._artifact.key(name), self._attempt.owner
        for store in self.active():
            self.secondary_may_fail(store, partial(put_bytes, store, key, data, owner))

    def disk_sink(self, name: str, disk: Disk) -> MakeSink:
        """Return a function that opens the sink of a disk's stream on a store.

        A store without a known free space gets the largest size of the stream as a hint for its parts. Other stores get
        no hint, because they would refuse a thin disk for which they have too little space.
        Deflated grains of 64 KiB grow by at most 0.8 %, with marker and padding, plus 4 bytes of table each.
        """
        key, owner = self._artifact.key(name), self._attempt.owner
        largest = disk.capacity + disk.capacity // 64 + MiB
        return lambda store: store.writer(key, largest if store.usage().free is None else None, owner=owner)

    def open_sinks(self, stack: ExitStack, make: MakeSink) -> dict[str, Sink]:
        """Open a sink on every active store, the primary's first."""
        sinks: dict[str, Sink] = {}
        for store in self.active():
            self.secondary_may_fail(store, partial(self._add, sinks, stack, store, make))
        return sinks

    def _add(self, sinks: dict[str, Sink], stack: ExitStack, store: Store, make: MakeSink) -> None:
        sink = stack.enter_context(make(store))
        if sink.offset:
            stack.push(partial(_suspend, sink, self._attempt.will_resume))
        if self._disk_buffer:
            is_primary = store is self.primary
            slowness = SlowSinkDetector(0 if is_primary else self._attempt.settings.worker.min_store_rate or 0)
            check = self._attempt.check
            sink = DiskBuffer(sink, *self._disk_buffer, patient=is_primary, check=check, slowness=slowness)
            sink = stack.enter_context(sink)
        sinks[store.name] = sink


def _suspend(sink: Sink, will_resume: Callable[[BaseException], bool], *exc: object) -> None:
    """Keep the bytes of an earlier attempt if the block fails before its first new byte and another attempt follows."""
    if isinstance(exc[1], BaseException) and will_resume(exc[1]):
        sink.suspend()


def add_small_objects(manifest: Manifest, small: Mapping[str, bytes], role: str) -> Manifest:
    """Return the manifest with entries for the small objects."""
    for name, data in small.items():
        manifest = manifest.with_entry(Entry(name, len(data), str(digest_of(data)), role))
    return manifest


def publish(
    attempt: Attempt, stores: Mapping[str, Store], stored: StreamResult, manifest: Manifest, small: Mapping[str, bytes]
) -> dict[str, Any]:
    """Write the *small* objects and the manifest on every store that has the other objects.

    *manifest* must list the small objects; see ``add_small_objects``. An error of the primary store is raised.
    Returns ``{"stores": […], "owed": {store: error}}`` for the job's result. Each error also names the ``artifact``.
    """
    attempt.progress.start("committing", manifest.size, manifest.size)
    owed = dict(stored.owed)
    for number, (name, store) in enumerate(stores.items()):
        if name in owed:
            continue
        try:
            for key, data in small.items():
                put_bytes(store, manifest.artifact.key(key), data, attempt.owner, attempt.confirm)
            write_manifest(store, manifest, attempt.owner, attempt.confirm)
            record_usage(attempt, store, manifest)
        except WorkerError as error:
            if number == 0 or isinstance(error, Cancelled):
                raise
            owed[name] = error
            with contextlib.suppress(WorkerError):  # clean-up removes the rest
                discard(store, manifest.artifact, attempt.confirm)
    for name, reason in owed.items():
        attempt.log.warning("store %s is owed %s: %s", name, manifest.artifact.prefix, reason)
    return _placement(stores, owed, manifest.artifact)


def find_placement(attempt: Attempt, stores: Mapping[str, Store], artifact: Artifact) -> dict[str, Any]:
    """Return what ``publish`` returns, for an artifact that an earlier job made."""
    owed: dict[str, WorkerError] = {}
    for name, store in stores.items():
        try:
            record_usage(attempt, store, read_manifest(store, artifact))
        except Cancelled:
            raise
        except WorkerError as error:
            owed[name] = error
    return _placement(stores, owed, artifact)


def _placement(stores: Mapping[str, Store], owed: Mapping[str, WorkerError], artifact: Artifact) -> dict[str, Any]:
    return {
        "stores": [name for name in stores if name not in owed],
        "owed": {name: error.as_dict() | {"artifact": artifact.prefix} for name, error in owed.items()},
    }
