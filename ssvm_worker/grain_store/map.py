"""A grain map: which grain of which pack holds which part of a disk. One for each disk of a backup.

    magic "SSVMGMAP", version (u16), 0 (u16), bytes of a grain (u32), bytes of the disk (u64),
    packs (u32), runs (u64), grains (u64)
    for each pack: id (16), bytes (u64), grains (u32), digest of its index (20)
    digest of all that (20)
    the runs, deflated; each is four varints (LEB128, the last two zigzag):
        grains of the disk left out since the run before · grains · pack, less that of the run before ·
        first grain in the pack, less the one behind the run before

All little-endian. A run is a stretch of the disk whose grains lie in one pack in the same order; a disk that was stored
at once has one run a pack. What no run covers is zeros.
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

from .grain import REMEDY, SIZE, digest
from .pack import Pack, read_range

#: What names end in: a sweep takes each such object below a volume for a map.
SUFFIX = ".grains"
#: The role of a map in a manifest.
ROLE = "grain map"
_HEAD = struct.Struct("<8sHHIQIQQ")
_PACK = struct.Struct(f"<16sQI{SIZE}s")
_MAGIC = b"SSVMGMAP"
_VERSION = 1
#: Deflated runs beyond this lie in a temporary file while they are written.
_IN_MEMORY = 8 * MiB
#: Encoded runs are deflated in pieces of so many bytes.
_PIECE = 64 * 1024
#: Bytes of an encoded run at the most: four varints of 64 bits.
_LONGEST_RUN = 40


@dataclass(frozen=True)
class GrainRun:
    """A stretch of a disk whose grains lie side by side in one pack."""

    #: Place on the disk, in grains.
    at: int
    #: How many.
    grains: int
    #: Place of the pack in the map's list.
    pack: int
    #: Place of the first one in the pack.
    first: int


class MapWriter:
    """Collects grains in the order of the disk. Holds the list of packs, and 8 MiB of runs at the most."""

    def __init__(self) -> None:
        #: Packs in the order of their first use, to their number.
        self._numbers: dict[str, int] = {}
        self._deflater = zlib.compressobj(6)
        self._runs: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - see close
        self._encoded = bytearray()
        self._count = 0
        self.grains = 0
        self._last = self._open = GrainRun(0, 0, 0, 0)

    def close(self) -> None:
        """Free the temporary file."""
        self._runs.close()

    def add(self, at: int, pack_id: str, number: int) -> None:
        """The grain at place *at* (in grains) of the disk is grain *number* of that pack."""
        pack = self._numbers.setdefault(pack_id, len(self._numbers))
        run = self._open
        self.grains += 1
        if run.pack == pack and run.at + run.grains == at and run.first + run.grains == number and run.grains:
            self._open = GrainRun(run.at, run.grains + 1, pack, run.first)
            return
        self._close_run()
        self._open = GrainRun(at, 1, pack, number)

    def _close_run(self) -> None:
        run, last = self._open, self._last
        if not run.grains:
            return
        for value in (
            run.at - last.at - last.grains,
            run.grains,
            _zigzag(run.pack - last.pack),
            _zigzag(run.first - last.first - last.grains),
        ):
            _put_varint(self._encoded, value)
        self._last = run
        self._count += 1
        if len(self._encoded) >= _PIECE:
            self._runs.write(self._deflater.compress(self._encoded))
            self._encoded.clear()

    @property
    def pack_ids(self) -> list[str]:
        """The packs that hold the disk, in the order of the map."""
        return list(self._numbers)

    def finish(self) -> None:
        """There is no more to add."""
        self._close_run()
        self._runs.write(self._deflater.compress(self._encoded) + self._deflater.flush())

    def chunks(self, grain_size: int, capacity: int, packs: Mapping[str, Pack]) -> Iterator[bytes]:
        """The bytes of the finished map, as often as they are wanted; *packs* knows each pack that was named."""
        used = [packs[each] for each in self._numbers]
        numbers = (grain_size, capacity, len(used), self._count, self.grains)
        table = [_PACK.pack(bytes.fromhex(each.id), each.size, each.grains, each.index_digest) for each in used]
        head = b"".join([_HEAD.pack(_MAGIC, _VERSION, 0, *numbers), *table])
        yield head + digest(head)
        self._runs.seek(0)
        while piece := self._runs.read(CHUNK):
            yield piece


class GrainMap:
    """A map as it is stored: its head at once, its runs as they are read. Holds the list of packs.

    *grain_size* and *capacity* are bytes; *grains* is how many of the disk are not zeros.
    Raises CorruptImage wherever it is not as it should be, ObjectNotFound.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.where = f"{store.name}:{key}"
        self._store = store
        self._key = key
        self.grain_size: int
        self.capacity: int
        self.grains: int
        head = read_range(store, key, 0, _HEAD.size)
        magic, version, _, self.grain_size, self.capacity, packs, self._count, self.grains = _HEAD.unpack(head)
        if magic != _MAGIC or version != _VERSION:
            raise self._bad("it has another magic or version")
        self._start = _HEAD.size + packs * _PACK.size + SIZE
        rest = read_range(store, key, _HEAD.size, self._start - _HEAD.size)
        if digest(head + rest[:-SIZE]) != rest[-SIZE:]:
            raise self._bad("its head is damaged")
        self.packs = [_pack(*each) for each in _PACK.iter_unpack(rest[:-SIZE])]

    def runs(self) -> Iterator[GrainRun]:
        """The runs in the order of the disk, each checked; holds some 100 KiB."""
        last = GrainRun(0, 0, 0, 0)
        seen = total = 0
        for gap, grains, pack, first in self._numbers():
            at, number = last.at + last.grains + gap, last.pack + _unzigzag(pack)
            last = GrainRun(at, grains, number, last.first + last.grains + _unzigzag(first))
            if not self._fits(last):
                raise self._bad(f"run {seen} lies outside the disk or its pack")
            seen, total = seen + 1, total + grains
            yield last
        if (seen, total) != (self._count, self.grains):
            raise self._bad(f"it has {seen} runs in place of {self._count}")

    def _fits(self, run: GrainRun) -> bool:
        known = 0 <= run.pack < len(self.packs) and run.grains > 0 and run.first >= 0
        return (
            known
            and run.first + run.grains <= self.packs[run.pack].grains
            and (run.at + run.grains - 1) * self.grain_size < self.capacity
        )

    def _numbers(self) -> Iterator[tuple[int, int, int, int]]:
        held = bytearray()
        try:
            for piece in self._inflated():
                held += piece
                at, safe = 0, len(held) - _LONGEST_RUN
                while at < safe:
                    run, at = _run_at(held, at)
                    yield run
                del held[:at]
            at = 0
            while at < len(held):
                run, at = _run_at(held, at)
                yield run
        except IndexError as error:
            raise self._bad("its last run is cut") from error

    def _inflated(self) -> Iterator[bytes]:
        inflater = zlib.decompressobj()
        try:
            for chunk in self._store.reader(self._key).open(self._start):
                pending = chunk
                while pending:
                    yield inflater.decompress(pending, _PIECE)
                    pending = inflater.unconsumed_tail
        except zlib.error as error:
            raise self._bad(str(error)) from error
        if not inflater.eof or inflater.unused_data:
            raise self._bad("its runs are cut short, or followed by something")

    def _bad(self, why: str) -> CorruptImage:
        return CorruptImage(f"The grain map cannot be read: {why}", self.where, REMEDY)


def _pack(id_: bytes, size: int, grains: int, index_digest: bytes) -> Pack:
    return Pack(id_.hex(), size, grains, index_digest)


def _run_at(data: bytearray, at: int) -> tuple[tuple[int, int, int, int], int]:
    """The run that begins at an offset, and the offset behind it."""
    values = [0, 0, 0, 0]
    for which in range(4):
        shift = 0
        while True:
            byte = data[at]
            at += 1
            values[which] |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
    return (values[0], values[1], values[2], values[3]), at


def _put_varint(to: bytearray, value: int) -> None:
    while value > 0x7F:
        to.append(value & 0x7F | 0x80)
        value >>= 7
    to.append(value)


def _zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def _unzigzag(value: int) -> int:
    return -(value + 1) // 2 if value & 1 else value // 2
