"""The stores of one artifact: the first must take it, any other may fail and is owed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, discard
from ssvm_worker.errors import Cancelled, ObjectNotFound, StoreUnavailable, WorkerError
from ssvm_worker.streaming.disk_buffer import DiskBuffer
from ssvm_worker.streaming.fan_out import SlowSinkDetector
from ssvm_worker.streaming.interfaces import Sink, Store
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.units import MiB

from .attempt import Attempt

if TYPE_CHECKING:
    from ssvm_worker.vmware.hardware import Disk

MakeSink = Callable[[Store], Sink]


class StoreSet:
    """Where the objects of one artifact go. Threads may share it.

    *spill*: the directory and size of each stream's scratch file for a slow store; None for no file.
    """

    def __init__(
        self, attempt: Attempt, artifact: Artifact, stores: Mapping[str, Store], spill: tuple[Path, int] | None = None
    ) -> None:
        self.stores = stores
        self.primary = next(iter(stores.values()))
        #: Stores that have failed, with their errors.
        self.owed: dict[str, WorkerError] = {}
        self._attempt = attempt
        self._artifact = artifact
        self._spill = spill

    def only_primary_must(self, store: Store, step: Callable[[], object]) -> None:
        """Do a step on a store; another than the primary may fail at it, and is owed the artifact then."""
        try:
            step()
        except WorkerError as error:
            if store is self.primary or isinstance(error, Cancelled):
                raise
            self.owed[store.name] = error

    def sweep(self, spare: str = "") -> None:
        """Nobody else may write this artifact now, so what lies there uncommitted is a dead attempt's: it goes.

        What the job *spare* has begun stays on the primary, where it is taken up again. Another store that cannot be
        swept is not owed the artifact for that: clean-up will.
        """
        for store in self.stores.values():
            spared = spare if store is self.primary else ""
            try:
                store.sweep(0, self._artifact.prefix, spare=spared)
            except WorkerError as error:
                if store is self.primary or isinstance(error, Cancelled):
                    raise

    def discard(self) -> None:
        """Remove what an unfinished backup has left."""
        for store in self.stores.values():
            self.only_primary_must(store, partial(discard, store, self._artifact, self._attempt.confirm))

    def has(self, entry: Entry) -> bool:
        """Whether the primary holds that object; another store that does not is owed the backup."""
        if not self._is_on(self.primary, entry):
            return False
        for store in list(self.stores.values())[1:]:
            self.only_primary_must(store, partial(self._insist, store, entry))
        return True

    def put(self, name: str, data: bytes) -> None:
        """Store a small object."""
        key, owner = self._artifact.key(name), self._attempt.owner
        for store in self.willing():
            self.only_primary_must(store, partial(put_bytes, store, key, data, owner))

    def file(self, name: str, disk: Disk) -> MakeSink:
        """Makes the sink of a disk's stream as it is."""
        key, owner = self._artifact.key(name), self._attempt.owner
        return lambda store: store.writer(key, _hint(store, disk), owner=owner)

    def open(self, stack: ExitStack, make: MakeSink) -> dict[str, Sink]:
        """A sink on every store that is not owed the artifact anyway; the primary's comes first."""
        sinks: dict[str, Sink] = {}
        for store in self.willing():
            self.only_primary_must(store, partial(self._add, sinks, stack, store, make))
        return sinks

    def _add(self, sinks: dict[str, Sink], stack: ExitStack, store: Store, make: MakeSink) -> None:
        sink = stack.enter_context(make(store))
        if sink.offset:
            stack.push(partial(_keep, sink, self._attempt.will_resume))
        if self._spill:
            is_primary = store is self.primary
            slowness = SlowSinkDetector(0 if is_primary else self._attempt.limits.min_store_rate)
            check = self._attempt.check
            sink = stack.enter_context(
                DiskBuffer(sink, *self._spill, patient=is_primary, check=check, slowness=slowness)
            )
        sinks[store.name] = sink

    def willing(self) -> list[Store]:
        """The stores that are not owed the artifact, the primary first."""
        return [store for store in self.stores.values() if store.name not in self.owed]

    def _is_on(self, store: Store, entry: Entry) -> bool:
        try:
            return store.stat(self._artifact.key(entry.name)).size == entry.size
        except ObjectNotFound:
            return False

    def _insist(self, store: Store, entry: Entry) -> None:
        if not self._is_on(store, entry):
            raise StoreUnavailable("It missed a disk of an earlier attempt", f"{store.name}:{entry.name}")


def _keep(sink: Sink, will_resume: Callable[[BaseException], bool], *exc: object) -> None:
    """Keep the bytes of an earlier attempt if an error that another attempt follows comes before the first new byte."""
    if isinstance(exc[1], BaseException) and will_resume(exc[1]):
        sink.suspend()


def _hint(store: Store, disk: Disk) -> int | None:
    """Bytes that the stream may have at the most, to size the parts of a store that cannot tell its free space.

    One that can must not be asked for room for all of a thin disk. Deflated grains of 64 KiB grow by 0.8 % at worst,
    marker and padding included, and 4 bytes of table each.
    """
    return None if store.usage().free is not None else disk.capacity + disk.capacity // 64 + MiB
