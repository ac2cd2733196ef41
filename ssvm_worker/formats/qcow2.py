"""QCOW2, versions 2 and 3: https://www.qemu.org/docs/master/interop/qcow2.html (big-endian).

     0  magic "QFI\\xfb"              48  refcount table, offset
     4  version                      56  refcount table, clusters
     8  backing file name, offset    60  snapshots, number
    16  backing file name, length    64  snapshot table, offset
    20  cluster bits                 72  incompatible features    ─┐
    24  virtual size, bytes          80  compatible features       │
    32  encryption method            88  autoclear features        ├ version 3
    36  L1 table, entries            96  refcount order            │
    40  L1 table, offset            100  header length             │
                                    104  compression type         ─┘

L1 entry: the offset of an L2 table, in bits 9 to 55. L2 entry: bit 62 compressed, bit 0 zero, else as L1; a compressed
one has its offset in the low 70 - cluster bits, above them the number of further sectors of 512 that it reaches into.

Safety: no backing file, no data file, no encryption, nothing unknown. Truncation: the header's tables, every L2 table
and every cluster begin inside the file. Refcounts, and what overlaps, are left to ``qemu-img check``.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ssvm_worker.errors import CorruptImage, ImageError, UnknownFormat, UnsafeImage

from .probe import MAX_RANGE, Facts, Range, Rules, corrupt, cut_short

MAGIC = b"QFI\xfb"
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
#: Limits of qemu's block/qcow2.h: QCOW_MAX_L1_SIZE and QCOW_MAX_REFTABLE_SIZE, in bytes.
_MAX_L1 = 32 << 20
_MAX_REFTABLE = 8 << 20
#: Our own: qemu takes 65536, no published image has more than a few.
_MAX_SNAPSHOTS = 1024
_SNAPSHOT_ENTRY = 40
_L1_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_EXT_DATA_FILE = 0x44415441
_COMPRESSED, _ZERO = 1 << 62, 1
#: L2 tables that are read. 65536 of the usual 64 KiB describe 32 TiB; of more, their places alone are checked.
_MAX_L2 = 65536
_ENCRYPTION = {1: "AES", 2: "LUKS"}
FLATTEN = "Flatten it: qemu-img convert -O qcow2 IN OUT"


class _Header(NamedTuple):
    magic: bytes
    version: int
    backing_offset: int
    backing_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = 72

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits


def matches(head: bytes) -> bool:
    """Whether the image begins as QCOW or QCOW2 do."""
    return head.startswith(MAGIC)


def rules(head: bytes, where: str) -> Rules:
    """Judge a qcow2; see probe."""
    header = _parse(head, where)
    _check_sizes(header, where)
    _check_outside(header, head, where)
    _check_features(header, head, where)
    l1_bytes = header.l1_size * 8
    furthest, last_byte = 0, 0
    if 0 < l1_bytes <= MAX_RANGE:
        table = (yield Range(header.l1_offset, l1_bytes)).data
        tables = sorted({entry & _L1_OFFSET_MASK for (entry,) in struct.iter_unpack(">Q", table)} - {0})
        furthest = max(tables, default=0)
        # A table that the stream has passed, as the L1 was moved behind it by a resize, cannot be read any more.
        passed = header.l1_offset + l1_bytes if header.l1_offset + l1_bytes > len(head) else 0
        for offset in tables if len(tables) <= _MAX_L2 else []:
            if offset >= passed or offset + header.cluster <= len(head):
                last_byte = max(last_byte, _last_byte((yield Range(offset, header.cluster)).data, header))
    details: dict[str, object] = {"version": header.version, "cluster_size": header.cluster}
    if header.snapshots:
        details["snapshots"] = header.snapshots
    facts = Facts("qcow2", header.size, details)
    size = (yield facts).size
    for what, end in (
        ("L1 table", header.l1_offset + l1_bytes),
        ("refcount table", header.refcount_offset + 8),
        ("snapshot table", header.snapshots_offset + header.snapshots * _SNAPSHOT_ENTRY if header.snapshots else 0),
        ("last L2 table", furthest + 8 if furthest else 0),
        ("last cluster", last_byte),
    ):
        if end > size:
            raise cut_short(f"its {what} goes to offset {end} at least", size, where)
    return facts


def _last_byte(table: bytes, header: _Header) -> int:
    """What the file must have, by one L2 table: a byte of each cluster; some leave out the end of the last."""
    bits = 70 - header.cluster_bits
    needed = 0
    for (entry,) in struct.iter_unpack(">Q", table):
        if entry & _COMPRESSED:
            offset, sectors = entry & ((1 << bits) - 1), (entry & (_COMPRESSED - 1)) >> bits
            needed = max(needed, (offset // 512 + sectors) * 512 + 1 if sectors else offset + 1)
        elif entry & _L1_OFFSET_MASK and not entry & _ZERO:
            needed = max(needed, (entry & _L1_OFFSET_MASK) + 1)
    return needed


def _parse(head: bytes, where: str) -> _Header:
    if len(head) < 72:
        raise cut_short("a qcow2 header has 72 bytes at least", len(head), where)
    version = struct.unpack_from(">I", head, 4)[0]
    if version not in (2, 3):
        raise UnknownFormat(f"This is version {version} of QCOW; 2 and 3 are taken", where, FLATTEN)
    if version == 3 and len(head) < 104:
        raise cut_short("a qcow2 header of version 3 has 104 bytes at least", len(head), where)
    layout = ">4sIQIIQIIQQIIQ"
    return _Header(*struct.unpack_from(layout + "QQQII" if version == 3 else layout, head))


def _check_sizes(header: _Header, where: str) -> None:
    """Bounds on every number that a reader would allocate by or seek to."""
    if not 9 <= header.cluster_bits <= 21:
        raise corrupt(f"The qcow2 has clusters of 2^{header.cluster_bits} bytes; 2^9 to 2^21 are allowed", where)
    if header.refcount_order > 6:
        raise corrupt(f"The qcow2 has a refcount order of {header.refcount_order}; 6 is the limit", where)
    if header.version == 3 and (header.header_length < 104 or header.header_length > header.cluster):
        raise corrupt(f"The qcow2 says that its header has {header.header_length} bytes", where)
    needed = -(-header.size // (header.cluster * header.cluster // 8))
    if header.size == 0 or max(needed, header.l1_size) * 8 > _MAX_L1 or header.l1_size < needed:
        raise corrupt(
            f"The qcow2 has a virtual size of {header.size} bytes and an L1 table of {header.l1_size} entries", where
        )
    if not 0 < header.refcount_clusters * header.cluster <= _MAX_REFTABLE:
        raise corrupt(f"The qcow2 has a refcount table of {header.refcount_clusters} clusters", where)
    if header.snapshots > _MAX_SNAPSHOTS:
        raise corrupt(f"The qcow2 has {header.snapshots} snapshots; {_MAX_SNAPSHOTS} are taken", where)
    for what, offset in (("L1", header.l1_offset), ("refcount", header.refcount_offset)):
        if offset == 0 or offset % header.cluster or offset >> 56:
            raise corrupt(f"The qcow2 has its {what} table at offset {offset}", where)


def _check_outside(header: _Header, head: bytes, where: str) -> None:
    """Nothing may lie outside the file, and nothing may hide in it."""
    if header.backing_offset or header.backing_size:
        name = head[header.backing_offset : header.backing_offset + min(header.backing_size, 1023)]
        raise UnsafeImage(f"The qcow2 names a backing file: {_printable(name)}", where, FLATTEN)
    if header.incompatible & DATA_FILE:
        name = _extension(header, head, _EXT_DATA_FILE)
        raise UnsafeImage(f"The qcow2 keeps its data in another file: {_printable(name)}", where, FLATTEN)
    if header.crypt_method:
        method = _ENCRYPTION.get(header.crypt_method, f"method {header.crypt_method}")
        raise UnsafeImage(
            f"The qcow2 is encrypted ({method})",
            where,
            "Decrypt it: its content cannot be judged, nor booted without its key",
        )


def _check_features(header: _Header, head: bytes, where: str) -> None:
    if error := _feature_error(header, where):
        raise error
    if header.header_length > len(head):
        raise cut_short(f"its header has {header.header_length} bytes", len(head), where)
    compression = head[104] if header.header_length > 104 else 0
    if compression > 1:
        raise UnknownFormat(f"The qcow2 is compressed in an unknown way ({compression})", where, FLATTEN)
    if bool(compression) != bool(header.incompatible & COMPRESSION):
        raise corrupt("The qcow2 contradicts itself about its compression", where)


def _feature_error(header: _Header, where: str) -> ImageError | None:
    if header.incompatible & CORRUPT:
        return CorruptImage("The qcow2 is marked as corrupt", where, "Repair it: qemu-img check -r all IMAGE")
    if header.incompatible & EXTENDED_L2:
        return UnknownFormat(
            "The qcow2 uses extended L2 entries (subclusters), which many hypervisors cannot read",
            where,
            "Convert it: qemu-img convert -O qcow2 -o extended_l2=off IN OUT",
        )
    if unknown := header.incompatible & ~_KNOWN:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        return UnsafeImage(f"The qcow2 has unknown incompatible features: bit {bits}", where, FLATTEN)
    return None


def _extension(header: _Header, head: bytes, wanted: int) -> bytes:
    """The data of a header extension, or nothing; they lie behind the header, in the first cluster."""
    at, end = header.header_length, min(header.cluster, len(head))
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", head, at)
        if kind in (0, wanted):
            return head[at + 8 : at + 8 + length][:1023] if kind else b""
        at += 8 + length + -length % 8
    return b""


def _printable(name: bytes) -> str:
    """A name out of a hostile image, fit for a log."""
    return ascii(name.split(b"\0")[0].decode("utf-8", "replace"))[1:-1] or "(its name cannot be read)"
