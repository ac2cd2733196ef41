"""A look at a mount, as a program by itself, so that it may hang in its caller's place: prints one line of JSON.

It imports the standard library only, and little of that: it starts every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time


def _look(point: str) -> dict[str, object]:
    """Ask the server: statfs is never answered from a cache, and neither is the attribute of an opened file."""
    started = time.monotonic()
    handle = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    seen = os.fstatvfs(handle)
    with contextlib.suppress(FileNotFoundError):  # whose export this is, is asked elsewhere
        os.close(os.open(".ssvm-store", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=handle))
    unit = seen.f_frsize
    total, used, free = seen.f_blocks * unit, (seen.f_blocks - seen.f_bfree) * unit, seen.f_bavail * unit
    return {"latency_s": time.monotonic() - started, "total": total, "used": used, "free": free}


def _main() -> None:
    try:
        answer = _look(sys.argv[1])
    except OSError as error:
        answer = {"errno": error.errno}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
