"""Speed of one core for the grains of a disk: inflate, hash, look up, map and pack, without a store."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.grain_store.index import Index
from ssvm_worker.grain_store.writer import DiskPacker
from ssvm_worker.units import MiB, human_size

from .contest import Row
from .vcenter import GRAIN, capacity_of, stream

#: Bytes of disk a second.
_MIN_RATE = 250 * 10**6


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Pack a disk with unknown grains, then the same disk again. The slowest run counts."""
    disk = stream(size // 2, size // GRAIN)
    rates: dict[str, list[float]] = {"all new": [], "nothing new": []}
    for _ in range(runs):
        with Index() as index:
            for what, found in rates.items():
                found.append(_rate(disk, capacity_of(size // 2), index))
                print(f"  {what}: {found[-1] / 1e6:.0f} MB/s", file=sys.stderr, flush=True)
    return [_row(f"grains, {what}, {human_size(size)} of disk", min(found)) for what, found in rates.items()]


def _rate(disk: bytes, capacity: int, index: Index) -> float:
    """Return the bytes of the disk that one second of CPU time packs."""
    started = time.process_time()
    with DiskPacker(index, capacity, "the bench") as packing:
        walker = StreamOptimized("the bench", capacity, take=packing.take)
        chunks = (disk[at : at + MiB] for at in range(0, len(disk), MiB))
        for _ in packing.stream(chunks, lambda: None, walker):
            pass
        packing.mark_stored()
        walker.finish()
    return packing.grains * GRAIN / (time.process_time() - started)


def _row(what: str, rate: float) -> Row:
    return Row(
        what, f"{rate / 1e6:.0f} MB/s of CPU time", "", "", "≥ 250 MB/s", "yes" if rate >= _MIN_RATE else "**no**"
    )
