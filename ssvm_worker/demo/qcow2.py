"""Writes a qcow2 image for the demo: version 3, every cluster allocated, accepted by `qemu-img check`.

Layout (qemu docs/interop/qcow2.rst): header, refcount table, refcount blocks, L1 table, L2 tables, data. A cluster has
64 KiB. So one L2 table maps 512 MiB, and one refcount block counts 32768 clusters (2 GiB).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

CLUSTER = 64 * 1024
#: Bit 63 of an L1 or L2 entry: the refcount is exactly one.
_COPIED = 1 << 63


def qcow2(data_bytes: int, virtual_size: int) -> Iterator[bytes]:
    """Yield an image with *data_bytes* of random data. The rest of *virtual_size* is unallocated.

    *data_bytes* is rounded up to clusters. Raises ValueError above about 2 GiB, the limit of one refcount block.
    """
    clusters = -(-data_bytes // CLUSTER)
    tables = -(-clusters // (CLUSTER // 8))
    used = 4 + tables + clusters
    if used > CLUSTER // 2:
        raise ValueError(f"data_bytes={data_bytes} needs more than one refcount block")
    yield _padded(_header(virtual_size, l1_entries=-(-virtual_size // (CLUSTER * CLUSTER // 8))))
    yield _padded(struct.pack(">Q", 2 * CLUSTER))
    yield _padded(struct.pack(f">{used}H", *[1] * used))
    yield _padded(b"".join(struct.pack(">Q", (4 + table) * CLUSTER | _COPIED) for table in range(tables)))
    first = 4 + tables
    entries = [struct.pack(">Q", (first + number) * CLUSTER | _COPIED) for number in range(clusters)]
    yield b"".join(entries).ljust(tables * CLUSTER, b"\0")
    for _ in range(clusters):
        yield os.urandom(CLUSTER)


def _header(virtual_size: int, l1_entries: int) -> bytes:
    fields = (b"QFI\xfb", 3, 0, 0, 16, virtual_size, 0, l1_entries, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, 104)
    return struct.pack(">4sIQIIQIIQQIIQQQQII", *fields)


def _padded(data: bytes) -> bytes:
    return data.ljust(CLUSTER, b"\0")
