"""The parts of the work, each measured alone: hash, write, receive, and the start of Python."""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import time
from pathlib import Path

from ssvm_worker.units import MiB

from .contest import run

#: Parts are short, so each is measured several times.
_TIMES = 3


def hash_s(size: int) -> float:
    """Return the CPU seconds for the SHA-256 of *size* bytes that are in the cache."""
    piece = os.urandom(MiB)

    def once() -> float:
        hasher, started = hashlib.sha256(), time.process_time()
        for _ in range(size // MiB):
            hasher.update(piece)
        return time.process_time() - started

    return statistics.median(once() for _ in range(_TIMES))


def write_s(directory: Path, size: int) -> float:
    """Return the CPU seconds to write a file of *size* bytes from a buffer that is in the cache."""
    piece, path = os.urandom(MiB), directory / "written"

    def once() -> float:
        started = time.process_time()
        with path.open("wb", buffering=0) as file:
            for _ in range(size // MiB):
                file.write(piece)
            os.fsync(file)
        elapsed = time.process_time() - started
        path.unlink()
        return elapsed

    return statistics.median(once() for _ in range(_TIMES))


def read_s(path: Path) -> float:
    """Return the CPU seconds to read a file into one buffer."""
    buffer = bytearray(MiB)

    def once() -> float:
        started = time.process_time()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        return time.process_time() - started

    return statistics.median(once() for _ in range(_TIMES))


def receive_s(curl: str, url: str, ca: Path) -> float:
    """Return the CPU seconds of curl to receive a file and discard it."""
    command = [curl, "-sS", "--fail", "--cacert", str(ca), "-o", "/dev/null", url]
    return statistics.median(run(command).cpu for _ in range(_TIMES))


def start_s(*modules: str, tls: bool = False) -> float:
    """Return the wall seconds of a Python that only imports these libraries. *tls*: and loads the authorities."""
    context = "; import ssl; ssl.create_default_context()" if tls else ""
    command = [sys.executable, "-c", f"import {', '.join(modules)}{context}"]
    return statistics.median(run(command).wall for _ in range(_TIMES))
