"""A pack: some tens of MiB of deflated grains in one object, with an index of itself at its end.

      0     magic "SSVMPACK"
      8     grains, one behind the other, each a zlib stream (RFC 1950) as the host sent it
      …     index: for each grain its length (u32), then for each the digest of its inflated bytes (20)
    -36     footer: magic "SSVMPIDX", version (u16), bytes of a digest (u16), grains (u32), digest of the index (20)

All little-endian. A pack is never changed: it is written once, and deleted when no backup needs a grain of it. An index
that is damaged can be made anew from the grains, as a zlib stream tells where it ends.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from ssvm_worker.artifacts.layout import PACKS
from ssvm_worker.errors import CorruptImage
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import KiB, MiB

from .grain import REMEDY, SIZE, digest

MAGIC = b"SSVMPACK"
_FOOTER = struct.Struct(f"<8sHHI{SIZE}s")
_FOOTER_MAGIC = b"SSVMPIDX"
_VERSION = 1
#: Bytes of one grain in the index.
_PER_GRAIN = 4 + SIZE
#: A pack is closed when its grains have so many bytes, or are so many: an index has 384 KiB at the most.
FULL = 32 * MiB
MOST_GRAINS = 16384
#: What is read of the end of a pack whose index is of unknown length: 1,300 grains, usual for a full pack.
_TAIL = 32 * KiB


@dataclass(frozen=True, slots=True)
class Pack:
    """One pack, by what a grain map says of it."""

    #: 32 hex digits, made up.
    id: str
    #: Bytes of the object.
    size: int
    #: How many grains are in it.
    grains: int
    #: Of its index, and so, by the digests in it, of all its bytes.
    index_digest: bytes

    def key(self, family: str) -> str:
        """Where it lies, below the directory of its volume's backups; 256 directories keep each of them short."""
        return pack_key(family, self.id)

    @property
    def index_at(self) -> int:
        """The offset of its index."""
        return self.size - _FOOTER.size - self.grains * _PER_GRAIN


def pack_key(family: str, pack_id: str) -> str:
    """See Pack.key."""
    return f"{family}/{PACKS}/{pack_id[:2]}/{pack_id}"


class PackIndex:
    """Where each grain of a pack lies, and its digest. Holds 32 bytes a grain."""

    def __init__(self, lengths: Iterable[int], digests: bytes) -> None:
        self._ends = array("L", accumulate(lengths, initial=len(MAGIC)))
        self._digests = digests

    def __len__(self) -> int:
        return len(self._ends) - 1

    def span(self, number: int) -> tuple[int, int]:
        """The offsets in the pack at which a grain begins and ends."""
        return self._ends[number], self._ends[number + 1]

    def digest(self, number: int) -> bytes:
        """The digest of a grain's inflated bytes."""
        return self._digests[number * SIZE : (number + 1) * SIZE]


class PackWriter:
    """A pack that grows; knows its bytes only by number. Holds 24 bytes a grain."""

    def __init__(self, pack_id: str) -> None:
        self.id = pack_id
        #: Bytes so far, the magic included.
        self.size = len(MAGIC)
        self._lengths = array("L")
        self._digests = bytearray()

    def add(self, data: bytes, key: bytes) -> int:
        """The number of the grain whose deflated bytes come next."""
        self._lengths.append(len(data))
        self._digests += key
        self.size += len(data)
        return len(self._lengths) - 1

    @property
    def full(self) -> bool:
        """Whether it is large enough."""
        return self.size >= FULL or len(self._lengths) >= MOST_GRAINS

    def end(self) -> tuple[bytes, Pack]:
        """Index and footer, which are the last bytes, and what is to be known of the pack."""
        index = struct.pack(f"<{len(self._lengths)}I", *self._lengths) + self._digests
        said = digest(index)
        tail = index + _FOOTER.pack(_FOOTER_MAGIC, _VERSION, SIZE, len(self._lengths), said)
        return tail, Pack(self.id, self.size + len(tail), len(self._lengths), said)


def read_index(store: Store, family: str, pack: Pack) -> PackIndex:
    """The index of a pack that a map names; CorruptImage unless it is the very same, ObjectNotFound."""
    key = pack.key(family)
    tail = read_range(store, key, pack.index_at, pack.size - pack.index_at)
    return index_in(pack, tail, f"{store.name}:{key}")


def index_in(pack: Pack, tail: bytes, where: str) -> PackIndex:
    """The index that the last bytes of a pack hold; CorruptImage unless it is the very same that a map names."""
    found, index = _parse(pack.id, pack.size, tail, where)
    if found != pack:
        raise CorruptImage("The pack is not the one that the grain map names", where, REMEDY)
    return index


def find_index(store: Store, key: str, size: int) -> tuple[Pack, PackIndex]:
    """The pack at that key and its index; CorruptImage when it is none."""
    where = f"{store.name}:{key}"
    pack_id = key.rpartition("/")[2]
    tail = read_range(store, key, max(0, size - _TAIL), min(size, _TAIL))
    need = _index_length(tail, where)
    if need > len(tail):
        tail = read_range(store, key, max(0, size - need), min(size, need))
    return _parse(pack_id, size, tail[-need:], where)


def _index_length(tail: bytes, where: str) -> int:
    """Bytes of index and footer, by the footer."""
    if len(tail) < _FOOTER.size:
        raise CorruptImage("The pack is cut short", where, REMEDY)
    magic, version, size, grains, _ = _FOOTER.unpack(tail[-_FOOTER.size :])
    if magic != _FOOTER_MAGIC or version != _VERSION or size != SIZE or not 0 < grains <= MOST_GRAINS:
        raise CorruptImage("The pack has no index that can be read", where, REMEDY)
    return _FOOTER.size + int(grains) * _PER_GRAIN


def _parse(pack_id: str, size: int, tail: bytes, where: str) -> tuple[Pack, PackIndex]:
    """*tail* is index and footer, and nothing else."""
    if _index_length(tail, where) != len(tail):
        raise CorruptImage("The pack's index is not whole", where, REMEDY)
    grains, said = _FOOTER.unpack(tail[-_FOOTER.size :])[3:]
    index = tail[: -_FOOTER.size]
    lengths = struct.unpack_from(f"<{grains}I", index)
    if digest(index) != said or len(MAGIC) + sum(lengths) + len(tail) != size:
        raise CorruptImage("The pack's index is damaged", where, REMEDY)
    return Pack(pack_id, size, grains, said), PackIndex(lengths, index[grains * 4 :])


def read_range(store: Store, key: str, start: int, length: int) -> bytes:
    """Bytes of an object, held at once; CorruptImage when it ends before them."""
    got = bytearray()
    chunks = store.reader(key).open(start)
    try:
        while len(got) < length and (chunk := next(chunks, b"")):
            got += chunk
    finally:
        chunks.close()
    if len(got) < length:
        raise CorruptImage("The object is cut short", f"{store.name}:{key}", REMEDY)
    return bytes(got[:length])
