"""A pack: some tens of MiB of deflated grains in one object, with an index at its end.

      0     magic "SSVMPACK"
      8     grains, one after the other; each is a zlib stream (RFC 1950) as the host sent it
      …     index: the length of each grain (u32), then the digest of each grain's inflated bytes (20)
    -36     footer: magic "SSVMPIDX", version (u16), bytes of a digest (u16), grains (u32), digest of the index (20)

All numbers are little-endian. A pack never changes: the worker writes it once. The worker deletes it when no backup
needs one of its grains. A damaged index can be rebuilt from the grains, because the end of a zlib stream is marked.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from ssvm_worker.artifacts.layout import PACKS
from ssvm_worker.errors import CorruptImage
from ssvm_worker.streaming import isal_zlib
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import KiB, MiB

#: Bytes of a digest: BLAKE2b-160. 10 TiB have 1.7e8 grains; the probability of an accidental collision is 1e-32.
#: A deliberate collision takes 2^80 tries. It damages only the attacker's volume, because volumes share no grains.
DIGEST_SIZE = 20
REMEDY = "Run `ssvm verify` to find the affected backups. Take a full backup, or restore from another store"
MAGIC = b"SSVMPACK"
_FOOTER = struct.Struct(f"<8sHHI{DIGEST_SIZE}s")
_FOOTER_MAGIC = b"SSVMPIDX"
_VERSION = 1
#: Bytes of one grain in the index.
_INDEX_ENTRY_SIZE = 4 + DIGEST_SIZE
#: The writer closes a pack at this many bytes or grains. So an index has at most 384 KiB.
FULL = 32 * MiB
MAX_GRAINS = 16384
#: Bytes to read from the end of a pack with an index of unknown length. They hold the index of 1,300 grains, which is
#: usual for a full pack.
_TAIL = 32 * KiB
#: Hex digits at the end of a pack's id that mark its writer. Random digits before them spread packs over directories.
_WRITER_DIGITS = 12


def digest(data: bytes) -> bytes:
    """Return the BLAKE2b digest of a grain's inflated bytes.

    BLAKE2b hashes 900 MB/s on one core of any machine. SHA-256 is faster only if the CPU has SHA-NI, else slower.
    """
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()


def inflate(data: bytes, max_bytes: int, location: str) -> bytes:
    """Inflate one grain of at most *max_bytes* bytes, and check its Adler-32.

    Raises CorruptImage if *data* is not exactly one complete zlib stream.
    """
    return isal_zlib.inflate(data, max_bytes, location, REMEDY)


@dataclass(frozen=True, slots=True)
class Pack:
    """The description of a pack in a grain map."""

    #: 32 hex digits; see ``new_pack_id``.
    id: str
    #: Bytes of the object.
    size: int
    #: The number of grains in the pack.
    grains: int
    #: The digest of the index. The index has the digests of all grains, so this digest covers all bytes of the pack.
    index_digest: bytes

    def key(self, family: str) -> str:
        """Return the pack's key below the directory of its volume's backups."""
        return pack_key(family, self.id)

    @property
    def index_at(self) -> int:
        """The offset of the index in the pack."""
        return self.size - _FOOTER.size - self.grains * _INDEX_ENTRY_SIZE

    @property
    def grain_bytes(self) -> int:
        """Bytes of the deflated grains."""
        return self.index_at - len(MAGIC)


def new_pack_id(writer: str) -> str:
    """Return a new id with the mark of its *writer*. So a backup finds the packs that another attempt has stored."""
    return uuid.uuid4().hex[:-_WRITER_DIGITS] + _writer_digits(writer)


def was_written_by(pack_id: str, writer: str) -> bool:
    """Return whether a pack is new in the backup of that writer. Wrong for one of 2.8e14 packs of others."""
    return pack_id.endswith(_writer_digits(writer))


def _writer_digits(writer: str) -> str:
    return hashlib.blake2b(writer.encode(), digest_size=_WRITER_DIGITS // 2).hexdigest()


def pack_key(family: str, pack_id: str) -> str:
    """Return the key of a pack. 256 directories keep each directory short."""
    return f"{family}/{PACKS}/{pack_id[:2]}/{pack_id}"


class PackIndex:
    """The offset and digest of each grain of a pack. Holds 32 bytes for each grain."""

    def __init__(self, lengths: Iterable[int], digests: bytes) -> None:
        self._ends = array("L", accumulate(lengths, initial=len(MAGIC)))
        self._digests = digests

    def __len__(self) -> int:
        return len(self._ends) - 1

    def span(self, number: int) -> tuple[int, int]:
        """Return the offsets in the pack at which a grain begins and ends."""
        return self._ends[number], self._ends[number + 1]

    def digest(self, number: int) -> bytes:
        """Return the digest of a grain's inflated bytes."""
        return self._digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]


class PackWriter:
    """The index of a pack that is being written; the caller writes the grains. Holds 24 bytes for each grain."""

    def __init__(self, pack_id: str) -> None:
        self.id = pack_id
        #: Bytes so far, including the magic.
        self.size = len(MAGIC)
        self._lengths = array("L")
        self._digests = bytearray()

    def add(self, data: bytes, key: bytes) -> int:
        """Add the next grain: its deflated bytes and its digest *key*. Return its number in the pack."""
        self._lengths.append(len(data))
        self._digests += key
        self.size += len(data)
        return len(self._lengths) - 1

    @property
    def full(self) -> bool:
        """Whether the pack has its maximum of bytes or grains."""
        return self.size >= FULL or len(self._lengths) >= MAX_GRAINS

    def end(self) -> tuple[bytes, Pack]:
        """Return index and footer, which are the last bytes of the pack, and the pack's description."""
        index = struct.pack(f"<{len(self._lengths)}I", *self._lengths) + self._digests
        index_digest = digest(index)
        tail = index + _FOOTER.pack(_FOOTER_MAGIC, _VERSION, DIGEST_SIZE, len(self._lengths), index_digest)
        return tail, Pack(self.id, self.size + len(tail), len(self._lengths), index_digest)


def read_index(store: Store, family: str, pack: Pack) -> PackIndex:
    """Read the index of a pack in a grain map.

    Raises CorruptImage if the index does not match the map, and ObjectNotFound.
    """
    key = pack.key(family)
    tail = read_range(store, key, pack.index_at, pack.size - pack.index_at)
    return index_in(pack, tail, f"{store.name}:{key}")


def index_in(pack: Pack, tail: bytes, location: str) -> PackIndex:
    """Parse the index in the last bytes of a pack. Raise CorruptImage if it does not match the grain map."""
    found, index = _parse(pack.id, pack.size, tail, location)
    if found != pack:
        raise CorruptImage("The pack differs from the pack in the grain map", location, REMEDY)
    return index


def find_index(store: Store, key: str, size: int) -> tuple[Pack, PackIndex]:
    """Read the description and the index of the pack at a key. Raise CorruptImage if the object is not a pack."""
    location = f"{store.name}:{key}"
    pack_id = key.rpartition("/")[2]
    tail = read_range(store, key, max(0, size - _TAIL), min(size, _TAIL))
    need = _index_length(tail, location)
    if need > len(tail):
        tail = read_range(store, key, max(0, size - need), min(size, need))
    return _parse(pack_id, size, tail[-need:], location)


def _index_length(tail: bytes, location: str) -> int:
    """Return the bytes of index and footer, as the footer gives them."""
    if len(tail) < _FOOTER.size:
        raise CorruptImage("The pack is truncated", location, REMEDY)
    magic, version, digest_size, grains, _ = _FOOTER.unpack(tail[-_FOOTER.size :])
    if magic != _FOOTER_MAGIC or version != _VERSION or digest_size != DIGEST_SIZE or not 0 < grains <= MAX_GRAINS:
        raise CorruptImage("The pack has no readable index", location, REMEDY)
    return _FOOTER.size + int(grains) * _INDEX_ENTRY_SIZE


def _parse(pack_id: str, size: int, tail: bytes, location: str) -> tuple[Pack, PackIndex]:
    """Parse *tail*, which must be exactly the index and the footer."""
    if _index_length(tail, location) != len(tail):
        raise CorruptImage("The pack's index is incomplete", location, REMEDY)
    grains, index_digest = _FOOTER.unpack(tail[-_FOOTER.size :])[3:]
    index = tail[: -_FOOTER.size]
    lengths = struct.unpack_from(f"<{grains}I", index)
    if digest(index) != index_digest or len(MAGIC) + sum(lengths) + len(tail) != size:
        raise CorruptImage("The pack's index is damaged", location, REMEDY)
    return Pack(pack_id, size, grains, index_digest), PackIndex(lengths, index[grains * 4 :])


def read_range(store: Store, key: str, start: int, length: int) -> bytes:
    """Return bytes of an object, all in memory. Raise CorruptImage if the object is shorter."""
    found = bytearray()
    chunks = store.reader(key).open(start)
    try:
        while len(found) < length and (chunk := next(chunks, b"")):
            found += chunk
    finally:
        chunks.close()
    if len(found) < length:
        raise CorruptImage("The object is truncated", f"{store.name}:{key}", REMEDY)
    return bytes(found[:length])
