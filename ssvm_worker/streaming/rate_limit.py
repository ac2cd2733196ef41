"""How fast bytes may pass: for one job, or for all processes of a worker together. Standard library only."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

#: Seconds of a rate that may be used up at once after a pause.
_BURST_S = 0.1


class SharedRateLimit:
    """So many bytes a second, for all who use it: also for processes that were forked after it was made.

    The one number in it is when the bytes that were let through will have been paid for. It lies in shared memory,
    which needs no directory. A record lock keeps other processes out, and the kernel releases it when its holder dies;
    it does not keep out threads of the same process, so they have a lock of their own.
    """

    def __init__(self) -> None:
        memory = os.memfd_create("ssvm-pace", os.MFD_CLOEXEC)
        self._file = open(memory, "r+b", buffering=0)  # noqa: SIM115 - closed when nobody has it any more
        self._file.truncate(8)
        self._threads = threading.Lock()

    def delay(self, size: int, rate: float) -> float:
        """Seconds to wait before *size* bytes may pass at *rate* bytes a second; they are counted at once."""
        now = time.monotonic()  # the same clock in every process of a machine
        file = self._file.fileno()
        with self._threads:
            fcntl.lockf(file, fcntl.LOCK_EX)
            try:
                (paid,) = struct.unpack("d", os.pread(file, 8, 0))
                paid = max(paid, now - _BURST_S) + size / rate
                os.pwrite(file, struct.pack("d", paid), 0)
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN)
        return max(0.0, float(paid) - now)


def paced(
    chunks: Iterable[bytes], limits: Sequence[tuple[SharedRateLimit, float]], wait: Callable[[float], None]
) -> Iterator[bytes]:
    """Pass the chunks on, not faster than any of the rates (bytes a second) allows. *wait* sleeps, and may raise."""
    for chunk in chunks:
        if delay := max((pace.delay(len(chunk), rate) for pace, rate in limits), default=0.0):
            wait(delay)
        yield chunk
