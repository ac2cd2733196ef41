"""Where a disk's new packs go on one store, and its grain map behind them."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock

from ssvm_worker.artifacts.layout import PACKS
from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.streaming.interfaces import LeavingAborts, Owner, Sink, Store, StoredObject
from ssvm_worker.units import MiB

from .pack import FULL, pack_key
from .writer import DiskPacker

#: More than a pack can have: its last grain may go beyond FULL, and its index has 400 KiB at the most.
_PACK_HINT = FULL + MiB


class GrainSink(LeavingAborts):
    """A ``Sink`` of a grain map: takes the bytes of the new packs, and commits the map that refers to them.

    Each pack is committed as it ends. Nobody refers to it before the map stands, so an abort leaves those that are
    whole to the next attempt, which finds them in the index, or to the sweep.
    """

    offset = 0

    def __init__(self, store: Store, family: str, key: str, packing: DiskPacker, owner: Owner) -> None:
        self.key = key
        self._store = store
        self._family = family
        self._packing = packing
        self._owner = owner
        self._pack: Sink | None = None
        #: Guards *_pack* between the thread that writes and one that aborts.
        self._lock = Lock()
        self._aborted = False
        self._number = 0
        self._at = 0

    def write(self, chunk: bytes) -> None:
        """See Sink. Where a pack ends is known to the Packing before the chunk with its end comes."""
        while chunk:
            pack = self._pack or self._open()
            end = (
                self._packing.ends[self._number]
                if self._number < len(self._packing.ends)
                else self._at + len(chunk) + 1
            )
            piece = chunk if end - self._at >= len(chunk) else chunk[: end - self._at]
            pack.write(piece)
            self._at += len(piece)
            chunk = chunk[len(piece) :]
            if self._at == end:
                pack.commit()
                self._pack, self._number = None, self._number + 1

    def _open(self) -> Sink:
        key = pack_key(self._family, self._packing.pack_ids[self._number])
        pack = self._store.writer(key, _PACK_HINT, owner=self._owner)
        with self._lock:
            if not self._aborted:
                self._pack = pack
                return pack
        pack.abort()
        raise StoreUnavailable("The write was aborted", f"{self._store.name}:{key}", "Start the backup again")

    def resumed(self) -> Iterator[bytes]:
        """Nothing."""
        return iter(())

    def commit(self) -> StoredObject:
        """Store the grain map; StoreUnavailable unless every pack that it needs is there."""
        self._refuse_missing()
        with self._store.writer(self.key, owner=self._owner) as sink:
            for chunk in self._packing.map_chunks():
                sink.write(chunk)
            return sink.commit()

    def _refuse_missing(self) -> None:
        there = {each.key: each.size for each in self._store.list(f"{self._family}/{PACKS}")}
        gone = [each.id for each in self._packing.packs().values() if there.get(each.key(self._family)) != each.size]
        if gone:
            what = f"{len(gone)} packs that the backup needs are gone, first {gone[0]}"
            raise StoreUnavailable(what, f"{self._store.name}:{self._family}", "Try again: they are stored anew")

    def abort(self) -> None:
        """See Sink."""
        with self._lock:
            self._aborted, pack = True, self._pack
        if pack:
            pack.abort()

    def suspend(self) -> None:
        """Abort: what is whole is kept anyway."""
        self.abort()
