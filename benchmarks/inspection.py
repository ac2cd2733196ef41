"""CPU time of the inspection of an image, compared with its SHA-256, which every transfer computes."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from random import Random

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.formats import Inspection
from ssvm_worker.units import KiB, human_size

from .contest import Row
from .vcenter import stream

_MAX_SHARE = 0.03
#: The cost is per chunk. Chunks of a fast socket have 1 MiB, so this is a bad case.
_CHUNK = 256 * KiB


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Measure the median CPU time of both over the same chunks, for raw bytes and for a host's VMDK."""
    noise = Random(1)
    raw = b"".join(noise.randbytes(_CHUNK) for _ in range(0, size, _CHUNK))
    return [_row("raw", raw, runs), _row("vmdk", stream(size), runs)]


def _row(kind: str, image: bytes, runs: int) -> Row:
    chunks = [image[at : at + _CHUNK] for at in range(0, len(image), _CHUNK)]
    hashing = statistics.median(_hash(chunks) for _ in range(runs))
    inspecting = statistics.median(_inspect(chunks, kind) for _ in range(runs))
    ok = "yes" if inspecting <= _MAX_SHARE * hashing else "**no**"
    what = f"inspection, {kind}, {human_size(len(image))}"
    costs = f"{inspecting * 1000:.1f} ms of CPU time", f"SHA-256: {hashing * 1000:.0f} ms"
    return Row(what, *costs, f"{inspecting / hashing:.2%}", f"≤ {_MAX_SHARE:.0%}", ok)


def _hash(chunks: list[bytes]) -> float:
    hasher, started = Hasher(), time.process_time()
    for chunk in chunks:
        hasher(chunk)
    return time.process_time() - started


def _inspect(chunks: list[bytes], kind: str) -> float:
    inspection, started = Inspection(kind), time.process_time()
    for chunk in chunks:
        inspection(chunk)
    inspection.finish()
    return time.process_time() - started
