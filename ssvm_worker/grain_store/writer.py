"""Store a disk as the grains that its volume does not have yet. All stores share one hash and one lookup.

with DiskPacker(index, capacity, location) as packer:
    walker = …(packer.take)                      # sees the stream of the disk, and calls ``take`` with each grain
    chunks = packer.stream(disk, check, walker)  # the bytes of the new packs, one after the other
    store_stream(chunks, {name: GrainSink(store, family, key, packer, owner)}, …)
    packer.mark_stored()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ssvm_worker.errors import CorruptImage
from ssvm_worker.streaming.interfaces import CHUNK, Check, Observer
from ssvm_worker.units import KiB

from .index import Index
from .map import MapWriter
from .pack import MAGIC, Pack, PackWriter, digest, inflate, new_pack_id, was_written_by

#: The packer yields new bytes when it holds at least this many.
_FLUSH_SIZE = CHUNK // 2


class DiskPacker:
    """Packs the grains of one disk. Holds a chunk, the index of one pack, and the memory of Index and MapWriter."""

    def __init__(self, index: Index, capacity: int, location: str, writer: str = "") -> None:
        """Prepare. *writer* names the disk of one backup. Its name is the same in all leases and attempts."""
        #: Bytes of the disk.
        self.capacity = capacity
        #: Bytes of a grain: the usual size before the first grain.
        self.grain_size = 64 * KiB
        #: The ids of the new packs in the order of the stream. Then the ends of finished packs in the stream.
        self.pack_ids: list[str] = []
        self.ends: list[int] = []
        self._index = index
        self._location = location
        self._writer = writer
        #: Bytes of this stream's packs so far, and deflated bytes of all grains.
        self._packed = self._deflated = 0
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
        self._index.end_stream(self, {})

    @property
    def grains(self) -> int:
        """The number of grains so far. Grains of zeros do not count."""
        return self._map.grains

    def stream(self, chunks: Iterable[bytes], check: Check, *observers: Observer) -> Iterator[bytes]:
        """Pass the disk's stream to the *observers*, and yield the bytes of the new packs.

        One observer must call ``take``. If the disk has no new grains, the function yields nothing. So it calls
        *check* for each chunk of the disk, because it may yield nothing for hours.
        """
        for chunk in chunks:
            check()
            for observe in observers:
                observe(chunk)
            if self._held >= _FLUSH_SIZE:
                yield from self._flush()
        self._end_pack()
        self._map.finish()
        yield from self._flush()

    def take(self, place: int, data: bytes, grain_size: int) -> None:
        """Add the next grain: its offset on the disk in grains, and its zlib stream. Raise CorruptImage."""
        self.grain_size = grain_size
        grain = inflate(data, grain_size, self._location)
        if len(grain) < min(grain_size, self.capacity - place * grain_size):
            what = f"The grain at byte {place * grain_size} inflates to only {len(grain)} bytes"
            raise CorruptImage(what, self._location)
        key = digest(grain)
        found = self._index.find(key, self)
        self._deflated += len(data)
        self._map.add(place, *(found or self._store(key, data)))

    def mark_stored(self) -> None:
        """Let other disks refer to the new packs. Call it when all stores have them."""
        self._index.end_stream(self, self._finished)

    def map_chunks(self) -> Iterator[bytes]:
        """Return the bytes of the grain map, after the stream has ended."""
        return self._map.chunks(self.grain_size, self.capacity, self.packs())

    def packs(self) -> dict[str, Pack]:
        """Return all packs of the disk, old and new, after the stream has ended."""
        return {each: self._finished.get(each) or self._index.pack(each) for each in self._map.pack_ids}

    def new_packs(self) -> list[Pack]:
        """Return the packs that the backup added to the volume, after the stream has ended.

        An earlier lease or attempt may have stored some of them.
        """
        return [each for each in self.packs().values() if was_written_by(each.id, self._writer)]

    def reused_bytes(self) -> int:
        """Return the deflated bytes of the grains that the volume already had, after the stream has ended."""
        return max(0, self._deflated - sum(each.grain_bytes for each in self.new_packs()))

    def _store(self, key: bytes, data: bytes) -> tuple[str, int]:
        """Add a new grain to the current pack, and return the pack's id and the grain's number."""
        pack = self._pack
        if pack is None:
            pack = self._pack = PackWriter(new_pack_id(self._writer))
            self._number = self._index.begin_pack(pack.id, self)
            self.pack_ids.append(pack.id)
            self._put(MAGIC)
        number = pack.add(data, key)
        self._put(data)
        self._index.add(self._number, number, key)
        if pack.full:
            self._end_pack()
        return pack.id, number

    def _end_pack(self) -> None:
        if self._pack:
            tail, pack = self._pack.end()
            self._put(tail)
            self._finished[pack.id] = pack
            self.ends.append(self._packed)
            self._pack = None

    def _put(self, data: bytes) -> None:
        self._out.append(data)
        self._held += len(data)
        self._packed += len(data)

    def _flush(self) -> Iterator[bytes]:
        data = b"".join(self._out)
        self._out.clear()
        self._held = 0
        for at in range(0, len(data), CHUNK):
            yield data[at : at + CHUNK]
