"""Limit the rate of bytes, for one job or for all processes of a worker together. Standard library only."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

#: Unused rate that may be used at once after a pause, in seconds of that rate.
_BURST_S = 0.1


class SharedRateLimit:
    """Rate limit in bytes a second that a process shares with its forks.

    The state is one number: the time until which the bytes so far use up the rate. It is in shared memory, which needs
    no directory. A record lock excludes other processes, and the kernel releases it if its holder dies. A record lock
    does not exclude threads of the same process, so threads use a second lock. Thread-safe.
    """

    def __init__(self) -> None:
        memory = os.memfd_create("ssvm-pace", os.MFD_CLOEXEC)
        self._file = open(memory, "r+b", buffering=0)  # noqa: SIM115 - closed with the last reference
        self._file.truncate(8)
        self._threads = threading.Lock()

    def delay(self, size: int, rate: float) -> float:
        """Count *size* bytes, and return the seconds to wait before they may pass at *rate* bytes a second."""
        now = time.monotonic()  # every process of a machine has the same clock
        file = self._file.fileno()
        with self._threads:
            fcntl.lockf(file, fcntl.LOCK_EX)
            try:
                (used_until,) = struct.unpack("d", os.pread(file, 8, 0))
                used_until = max(used_until, now - _BURST_S) + size / rate
                os.pwrite(file, struct.pack("d", used_until), 0)
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN)
        return max(0.0, float(used_until) - now)


def paced(
    chunks: Iterable[bytes], limits: Sequence[tuple[SharedRateLimit, float]], wait: Callable[[float], None]
) -> Iterator[bytes]:
    """Yield the chunks no faster than each of the rates (bytes a second) allows.

    *wait* sleeps for some seconds. An exception of *wait* propagates.
    """
    for chunk in chunks:
        if delay := max((limit.delay(len(chunk), rate) for limit, rate in limits), default=0.0):
            wait(delay)
        yield chunk
