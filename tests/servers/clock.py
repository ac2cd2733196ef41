"""Wall clocks of single processes that a test sets as it likes; see clock.c."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock.c")


def find_compiler() -> str | None:
    """What builds the library that is preloaded."""
    return shutil.which("cc") or shutil.which("gcc")


class Clock:
    """The wall clock of whoever starts with ``environ``: right until ``jump``. Files' times stay the kernel's."""

    def __init__(self, directory: Path, name: str) -> None:
        compiler, library = find_compiler(), directory / "clock.so"
        if compiler and not library.exists():
            command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE)]
            subprocess.run(command, check=True)
        path = directory / f"{name}.shift"
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)
        #: Empty where there is no compiler: then the clock cannot be set.
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(path)} if compiler else {}

    def jump(self, seconds: int) -> None:
        """Be so many seconds ahead of the right time from now on, or behind it."""
        self._page[:] = struct.pack("@l", seconds)
