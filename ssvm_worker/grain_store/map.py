"""A grain map: it maps ranges of a disk to grains of packs. A backup has one map for each disk.

    - head: magic "SSVMGMAP", version (u16), 0 (u16), bytes of a grain (u32), bytes of the disk (u64)
    - head, continued: packs (u32), runs (u64), grains (u64)
    - for each pack: id (16), bytes (u64), grains (u32), digest of its index (20)
    - the digest of all bytes so far (20)
    - the runs, deflated; each run is four varints (LEB128, the last two zigzag):
      1. the number of grains of the disk between the previous run and this run
      2. the number of grains in this run
      3. the pack's number minus that of the previous run
      4. the number of the first grain in the pack minus the number that would continue the previous run

All numbers are little-endian. A run is a range of the disk whose grains are in one pack in the same order. A disk that
was stored in one backup has one run for each pack. Ranges without a run are zeros.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from ssvm_worker.errors import CorruptImage
from ssvm_worker.streaming.interfaces import CHUNK, Store
from ssvm_worker.units import MiB

from .pack import DIGEST_SIZE, REMEDY, Pack, digest, read_range

#: The suffix of a map's name. The sweep treats each object of a volume with this suffix as a map.
SUFFIX = ".grains"
#: The role of a map in a manifest.
ROLE = "grain map"
_HEAD = struct.Struct("<8sHHIQIQQ")
_PACK = struct.Struct(f"<16sQI{DIGEST_SIZE}s")
_MAGIC = b"SSVMGMAP"
_VERSION = 1
#: The writer holds this many bytes of deflated runs in memory, and the others in a temporary file.
_IN_MEMORY = 8 * MiB
#: Encoded runs are deflated in pieces of this many bytes.
_PIECE = 64 * 1024
#: The largest encoded run in bytes: four varints of 64 bits.
_MAX_RUN_SIZE = 40


@dataclass(frozen=True)
class GrainRun:
    """A range of a disk whose grains are adjacent in one pack."""

    #: Offset on the disk, in grains.
    at: int
    #: The number of grains.
    grains: int
    #: The number of the pack in the map's list.
    pack: int
    #: The number of the first grain in the pack.
    first: int


class MapWriter:
    """Collects grains in the order of the disk. Holds the list of packs, and at most 8 MiB of runs."""

    def __init__(self) -> None:
        #: The number of each pack by its id, in the order of first use.
        self._numbers: dict[str, int] = {}
        self._deflater = zlib.compressobj(6)
        self._runs: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - see close
        self._encoded = bytearray()
        self._count = 0
        self.grains = 0
        self._last = self._open = GrainRun(0, 0, 0, 0)

    def close(self) -> None:
        """Delete the temporary file."""
        self._runs.close()

    def add(self, at: int, pack_id: str, number: int) -> None:
        """Map grain *at* of the disk to grain *number* of a pack."""
        pack = self._numbers.setdefault(pack_id, len(self._numbers))
        run = self._open
        self.grains += 1
        if run.pack == pack and run.at + run.grains == at and run.first + run.grains == number and run.grains:
            self._open = GrainRun(run.at, run.grains + 1, pack, run.first)
            return
        self._close_run()
        self._open = GrainRun(at, 1, pack, number)

    def _close_run(self) -> None:
        """Encode the open run, and deflate the encoded runs when they fill a piece."""
        run, last = self._open, self._last
        if not run.grains:
            return
        for value in (
            run.at - last.at - last.grains,
            run.grains,
            _zigzag(run.pack - last.pack),
            _zigzag(run.first - last.first - last.grains),
        ):
            rest = value
            while rest > 0x7F:
                self._encoded.append(rest & 0x7F | 0x80)
                rest >>= 7
            self._encoded.append(rest)
        self._last = run
        self._count += 1
        if len(self._encoded) >= _PIECE:
            self._runs.write(self._deflater.compress(self._encoded))
            self._encoded.clear()

    @property
    def pack_ids(self) -> list[str]:
        """The ids of the packs in the order of the map."""
        return list(self._numbers)

    def finish(self) -> None:
        """End the map. The caller adds no more grains."""
        self._close_run()
        self._runs.write(self._deflater.compress(self._encoded) + self._deflater.flush())

    def chunks(self, grain_size: int, capacity: int, packs: Mapping[str, Pack]) -> Iterator[bytes]:
        """Yield the bytes of the finished map. *packs* has each pack of ``pack_ids``. The call can be repeated."""
        used = [packs[each] for each in self._numbers]
        numbers = (grain_size, capacity, len(used), self._count, self.grains)
        table = [_PACK.pack(bytes.fromhex(each.id), each.size, each.grains, each.index_digest) for each in used]
        head = b"".join([_HEAD.pack(_MAGIC, _VERSION, 0, *numbers), *table])
        yield head + digest(head)
        self._runs.seek(0)
        while piece := self._runs.read(CHUNK):
            yield piece


class GrainMap:
    """A stored map. Reads the head at once and the runs on demand. Holds the list of packs.

    *grain_size* and *capacity* are in bytes. *grains* is the number of grains of the disk that are not zeros.
    Each method raises CorruptImage for an invalid map, and ObjectNotFound.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.location = f"{store.name}:{key}"
        self._store = store
        self._key = key
        self.grain_size: int
        self.capacity: int
        self.grains: int
        head = read_range(store, key, 0, _HEAD.size)
        magic, version, _, self.grain_size, self.capacity, packs, self._count, self.grains = _HEAD.unpack(head)
        if magic != _MAGIC or version != _VERSION:
            raise self._corrupt("its magic number or version is unknown")
        self._start = _HEAD.size + packs * _PACK.size + DIGEST_SIZE
        rest = read_range(store, key, _HEAD.size, self._start - _HEAD.size)
        if digest(head + rest[:-DIGEST_SIZE]) != rest[-DIGEST_SIZE:]:
            raise self._corrupt("its head is damaged")
        fields = _PACK.iter_unpack(rest[:-DIGEST_SIZE])
        self.packs = [Pack(id_.hex(), size, grains, index) for id_, size, grains, index in fields]

    def runs(self) -> Iterator[GrainRun]:
        """Yield the runs in the order of the disk, and check each run. Holds about 100 KiB."""
        last = GrainRun(0, 0, 0, 0)
        seen = total = 0
        for gap, grains, pack, first in self._numbers():
            at, number = last.at + last.grains + gap, last.pack + _unzigzag(pack)
            last = GrainRun(at, grains, number, last.first + last.grains + _unzigzag(first))
            if not self._is_valid(last):
                raise self._corrupt(f"run {seen} is outside the disk or its pack")
            seen, total = seen + 1, total + grains
            yield last
        if (seen, total) != (self._count, self.grains):
            raise self._corrupt(f"it has {seen} runs instead of {self._count}")

    def _is_valid(self, run: GrainRun) -> bool:
        """Return whether the run is inside the disk and inside its pack."""
        known = 0 <= run.pack < len(self.packs) and run.grains > 0 and run.first >= 0
        return (
            known
            and run.first + run.grains <= self.packs[run.pack].grains
            and (run.at + run.grains - 1) * self.grain_size < self.capacity
        )

    def _numbers(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield the four numbers of each run."""
        held = bytearray()
        try:
            for piece in self._inflated():
                held += piece
                at, safe = 0, len(held) - _MAX_RUN_SIZE
                while at < safe:
                    run, at = _run_at(held, at)
                    yield run
                del held[:at]
            at = 0
            while at < len(held):
                run, at = _run_at(held, at)
                yield run
        except IndexError as error:
            raise self._corrupt("its last run is truncated") from error

    def _inflated(self) -> Iterator[bytes]:
        inflater = zlib.decompressobj()
        try:
            for chunk in self._store.reader(self._key).open(self._start):
                pending = chunk
                while pending:
                    yield inflater.decompress(pending, _PIECE)
                    pending = inflater.unconsumed_tail
        except zlib.error as error:
            raise self._corrupt(str(error)) from error
        if not inflater.eof or inflater.unused_data:
            raise self._corrupt("its runs are truncated, or other bytes follow them")

    def _corrupt(self, reason: str) -> CorruptImage:
        return CorruptImage(f"The grain map cannot be read: {reason}", self.location, REMEDY)


def _run_at(data: bytearray, at: int) -> tuple[tuple[int, int, int, int], int]:
    """Return the numbers of the run at an offset, and the offset of the next run."""
    values = [0, 0, 0, 0]
    for field in range(4):
        shift = 0
        while True:
            byte = data[at]
            at += 1
            values[field] |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
    return (values[0], values[1], values[2], values[3]), at


def _zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def _unzigzag(value: int) -> int:
    return -(value + 1) // 2 if value & 1 else value // 2
