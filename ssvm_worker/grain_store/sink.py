"""Write the new packs of a disk, and then its grain map, to one store."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from ssvm_worker.artifacts.layout import PACKS
from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.streaming.interfaces import CannotResume, Owner, Sink, Store, StoredObject
from ssvm_worker.units import MiB

from .pack import FULL, pack_key
from .writer import DiskPacker

#: More bytes than a pack can have. Its last grain may exceed FULL, and its index has at most 400 KiB.
_PACK_HINT = FULL + MiB


class GrainSink(CannotResume):
    """A sink for a grain map. It writes the bytes of the new packs, and commits the map that refers to them.

    It commits each pack at the pack's end. Only the committed map refers to the packs. An abort leaves complete packs:
    the next attempt finds them in the index, or the sweep deletes them. So a suspend is an abort too.
    """

    def __init__(
        self,
        store: Store,
        family: str,
        key: str,
        packer: DiskPacker,
        owner: Owner,
        *,
        stored: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Prepare. *stored* gets the size of each committed pack. An error of *stored* fails the sink."""
        self.key = key
        self._store = store
        self._family = family
        self._packer = packer
        self._owner = owner
        self._stored = stored
        self._pack: Sink | None = None
        #: Guards *_pack* between the writing thread and an aborting thread.
        self._lock = Lock()
        self._aborted = False
        self._number = 0
        self._at = 0

    def write(self, chunk: bytes) -> None:
        """See Sink. The packer knows the end of a pack before it yields the chunk with that end."""
        while chunk:
            pack = self._pack or self._open()
            ends = self._packer.ends
            end = ends[self._number] if self._number < len(ends) else self._at + len(chunk) + 1
            piece = chunk if end - self._at >= len(chunk) else chunk[: end - self._at]
            pack.write(piece)
            self._at += len(piece)
            chunk = chunk[len(piece) :]
            if self._at == end:
                size = pack.commit().size
                self._pack, self._number = None, self._number + 1
                self._stored(size)

    def _open(self) -> Sink:
        key = pack_key(self._family, self._packer.pack_ids[self._number])
        pack = self._store.writer(key, _PACK_HINT, owner=self._owner)
        with self._lock:
            if not self._aborted:
                self._pack = pack
                return pack
        pack.abort()
        raise StoreUnavailable("The write was aborted", f"{self._store.name}:{key}", "Start the backup again")

    def commit(self) -> StoredObject:
        """Store the grain map. Raise StoreUnavailable if a pack of the map is missing on the store."""
        present = {each.key: each.size for each in self._store.list(f"{self._family}/{PACKS}")}
        packs = self._packer.packs().values()
        missing = [each.id for each in packs if present.get(each.key(self._family)) != each.size]
        if missing:
            what = f"{len(missing)} packs of the backup are missing. The first is {missing[0]}"
            remedy = "Retry; the next attempt stores them again"
            raise StoreUnavailable(what, f"{self._store.name}:{self._family}", remedy)
        with self._store.writer(self.key, owner=self._owner) as sink:
            for chunk in self._packer.map_chunks():
                sink.write(chunk)
            return sink.commit()

    def abort(self) -> None:
        """See Sink."""
        with self._lock:
            self._aborted, pack = True, self._pack
        if pack:
            pack.abort()
