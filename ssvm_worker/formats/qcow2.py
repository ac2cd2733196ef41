r"""Check QCOW2, versions 2 and 3: https://www.qemu.org/docs/master/interop/qcow2.html (big-endian).

     0  magic "QFI\xfb"              48  refcount table, offset
     4  version                      56  refcount table, clusters
     8  backing file name, offset    60  snapshots, number
    16  backing file name, length    64  snapshot table, offset
    20  cluster bits                 72  incompatible features    ─┐
    24  virtual size, bytes          80  compatible features       │
    32  encryption method            88  autoclear features        ├ version 3
    36  L1 table, entries            96  refcount order            │
    40  L1 table, offset            100  header length             │
                                    104  compression type         ─┘

Safety: no backing file, no data file, no encryption, no unknown feature.
Truncation: every allocated unit is completely inside the file (see ``qcow2_clusters``).
Wrong refcounts and overlaps are not checked here. ``qemu-img check`` finds them.
"""

from __future__ import annotations

import struct

from ssvm_worker.errors import CorruptImage, UnknownFormat, UnsafeImage

from .detect import ImageFacts, Rules, corrupt, cut_short
from .qcow2_clusters import Header, Units

MAGIC = b"QFI\xfb"
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
#: Limits of qemu's block/qcow2.h: QCOW_MAX_L1_SIZE and QCOW_MAX_REFTABLE_SIZE, in bytes.
_MAX_L1 = 32 << 20
_MAX_REFTABLE = 8 << 20
#: The worker's own limit. qemu accepts 65536. No published image has more than a few.
_MAX_SNAPSHOTS = 1024
_EXT_DATA_FILE, _EXT_BITMAPS = 0x44415441, 0x23852875
_ENCRYPTION = {1: "AES", 2: "LUKS"}
FLATTEN = "Flatten it: qemu-img convert -O qcow2 IN OUT"


def matches(head: bytes) -> bool:
    """Return whether the image begins as QCOW or QCOW2."""
    return head.startswith(MAGIC)


def rules(head: bytes, where: str) -> Rules:
    """Check a qcow2. See ``detect``."""
    header = _parse(head, where)
    _check_sizes(header, where)
    # Refuse references to other files, and encryption.
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
            "Decrypt it: without its key, its content can be neither checked nor booted",
        )
    _check_features(header, head, where)
    units = Units(header, _extension(header, head, _EXT_BITMAPS), bool(header.incompatible & COMPRESSION), where)
    yield from units.read()
    details: dict[str, object] = {"version": header.version, "cluster_size": header.cluster}
    if header.snapshots:
        details["snapshots"] = header.snapshots
    tail, size = yield ImageFacts("qcow2", header.size, details)
    units.check(tail, size)
    return ImageFacts("qcow2", header.size, details | ({"warnings": units.warnings} if units.warnings else {}))


def _parse(head: bytes, where: str) -> Header:
    if len(head) < 72:
        raise cut_short("a qcow2 header has 72 bytes or more", len(head), where)
    version = struct.unpack_from(">I", head, 4)[0]
    if version not in (2, 3):
        raise UnknownFormat(f"This is version {version} of QCOW. Only 2 and 3 are supported", where, FLATTEN)
    if version == 3 and len(head) < 104:
        raise cut_short("a qcow2 header of version 3 has 104 bytes or more", len(head), where)
    layout = ">4sIQIIQIIQQIIQ"
    return Header(*struct.unpack_from(layout + "QQQII" if version == 3 else layout, head))


def _check_sizes(header: Header, where: str) -> None:
    """Check each number by which a reader would allocate memory or seek."""
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
        raise corrupt(f"The qcow2 has {header.snapshots} snapshots; {_MAX_SNAPSHOTS} are allowed", where)
    for what, offset in (("L1", header.l1_offset), ("refcount", header.refcount_offset)):
        if offset == 0 or offset % header.cluster or offset >> 56:
            raise corrupt(f"The qcow2 has its {what} table at offset {offset}", where)


def _check_features(header: Header, head: bytes, where: str) -> None:
    if header.incompatible & CORRUPT:
        raise CorruptImage("The qcow2 is marked as corrupt", where, "Repair it: qemu-img check -r all IMAGE")
    if header.incompatible & EXTENDED_L2:
        raise UnknownFormat(
            "The qcow2 uses extended L2 entries (subclusters), which many hypervisors cannot read",
            where,
            "Convert it: qemu-img convert -O qcow2 -o extended_l2=off IN OUT",
        )
    if unknown := header.incompatible & ~_KNOWN:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise UnsafeImage(f"The qcow2 has unknown incompatible features: bit {bits}", where, FLATTEN)
    if header.header_length > len(head):
        raise cut_short(f"its header has {header.header_length} bytes", len(head), where)
    compression = head[104] if header.header_length > 104 else 0
    if compression > 1:
        raise UnknownFormat(f"The qcow2 is compressed in an unknown way ({compression})", where, FLATTEN)
    if bool(compression) != bool(header.incompatible & COMPRESSION):
        raise corrupt("The qcow2 contradicts itself about its compression", where)


def _extension(header: Header, head: bytes, wanted: int) -> bytes:
    """Return the data of a header extension, or b"". The extensions follow the header, in the first cluster."""
    at, end = header.header_length, min(header.cluster, len(head))
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", head, at)
        if kind in (0, wanted):
            return head[at + 8 : at + 8 + length][:1023] if kind else b""
        at += 8 + length + -length % 8
    return b""


def _printable(name: bytes) -> str:
    """Return a name of a hostile image in a form that is safe in a log."""
    return ascii(name.split(b"\0")[0].decode("utf-8", "replace"))[1:-1] or "(its name cannot be read)"
