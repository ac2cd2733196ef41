"""Stores a disk as the grains that its volume does not have yet: one hash and one look for all stores together.

with Packing(index, capacity, where) as packing:
    walker = …(packing.take)                      # sees the stream of the disk, and hands over each grain
    chunks = packing.stream(disk, check, walker)  # the bytes of new packs, one behind the other
    store_stream(chunks, {name: GrainSink(store, key, packing, owner)}, …)
    packing.settle()
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator

from ssvm_worker.errors import CorruptImage
from ssvm_worker.streaming.interfaces import CHUNK, Check, Observer
from ssvm_worker.units import KiB

from .grain import digest, inflate
from .index import Index
from .map import MapWriter
from .pack import MAGIC, Pack, PackWriter

#: New bytes that are gathered into one chunk.
_ENOUGH = CHUNK // 2


class DiskPacker:
    """One disk on its way into packs. Holds a chunk, the index of one pack, and what Index and MapWriter hold."""

    def __init__(self, index: Index, capacity: int, where: str) -> None:
        #: Bytes of the disk.
        self.capacity = capacity
        #: Bytes of a grain; the usual ones until the first has come.
        self.grain_size = 64 * KiB
        #: Grains that the volume did not have.
        self.new_grains = 0
        #: Bytes of the new packs so far, and deflated bytes of grains that need not be stored again.
        self.new_bytes = self.reused_bytes = 0
        #: The new packs in the order of the stream, and the offsets in it at which the finished ones end.
        self.pack_ids: list[str] = []
        self.ends: list[int] = []
        self._index = index
        self._where = where
        self._map = MapWriter()
        self._finished: dict[str, Pack] = {}
        self._pack: PackWriter | None = None
        self._number = 0
        self._out: list[bytes] = []
        self._held = 0

    def __enter__(self) -> DiskPacker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._map.close()
        self._index.settle(self, {})

    @property
    def grains(self) -> int:
        """Grains of the disk that have come: those that hold something."""
        return self._map.grains

    def stream(self, chunks: Iterable[bytes], check: Check, *observers: Observer) -> Iterator[bytes]:
        """Yield the bytes of the new packs while the *observers* see the disk's stream; none if nothing is new.

        One of them is to call ``take``.

        *check* is called for each chunk of the disk, as there may be nothing to yield for hours.
        """
        for chunk in chunks:
            check()
            for observe in observers:
                observe(chunk)
            if self._held >= _ENOUGH:
                yield from self._flush()
        self._end_pack()
        self._map.finish()
        yield from self._flush()

    def take(self, place: int, data: bytes, grain_size: int) -> None:
        """The next grain of the disk: its *place*, in grains, and its zlib stream. CorruptImage if that is broken."""
        self.grain_size = grain_size
        grain = inflate(data, grain_size, self._where)
        if len(grain) < min(grain_size, self.capacity - place * grain_size):
            raise CorruptImage(f"The grain at byte {place * grain_size} inflates to {len(grain)} bytes", self._where)
        key = digest(grain)
        found = self._index.find(key, self)
        if found:
            self.reused_bytes += len(data)
        self._map.add(place, *(found or self._store(key, data)))

    def settle(self) -> None:
        """All is stored: what is new may be referred to by other disks."""
        self._index.settle(self, self._finished)

    def map_chunks(self) -> Iterator[bytes]:
        """The bytes of the grain map, when the stream has ended."""
        return self._map.chunks(self.grain_size, self.capacity, self.packs())

    def packs(self) -> dict[str, Pack]:
        """Every pack that the disk needs, old and new, when the stream has ended."""
        return {each: self._finished.get(each) or self._index.pack(each) for each in self._map.pack_ids}

    def _store(self, key: bytes, data: bytes) -> tuple[str, int]:
        pack = self._pack or self._begin_pack()
        number = pack.add(data, key)
        self._put(data)
        self._index.add(self._number, number, key)
        self.new_grains += 1
        if pack.full:
            self._end_pack()
        return pack.id, number

    def _begin_pack(self) -> PackWriter:
        self._pack = PackWriter(uuid.uuid4().hex)
        self._number = self._index.grow(self._pack.id, self)
        self.pack_ids.append(self._pack.id)
        self._put(MAGIC)
        return self._pack

    def _end_pack(self) -> None:
        if self._pack:
            tail, pack = self._pack.end()
            self._put(tail)
            self._finished[pack.id] = pack
            self.ends.append(self.new_bytes)
            self._pack = None

    def _put(self, data: bytes) -> None:
        self._out.append(data)
        self._held += len(data)
        self.new_bytes += len(data)

    def _flush(self) -> Iterator[bytes]:
        data = b"".join(self._out)
        self._out.clear()
        self._held = 0
        for at in range(0, len(data), CHUNK):
            yield data[at : at + CHUNK]
