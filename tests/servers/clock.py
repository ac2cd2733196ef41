"""Wall clocks of single processes. A test can set them: see clock.c."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock.c")


def find_compiler() -> str | None:
    """Build the library that a process preloads."""
    return shutil.which("cc") or shutil.which("gcc")


class Clock:
    """The wall clock of the processes that start with ``environ``. File times are still those of the kernel."""

    def __init__(self, directory: Path, name: str) -> None:
        compiler, library = find_compiler(), directory / "clock.so"
        if compiler and not library.exists():
            command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE)]
            subprocess.run(command, check=True)
        path = directory / f"{name}.shift"
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)
        #: Empty without a compiler. Then no test can set the clock.
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(path)} if compiler else {}

    def jump(self, seconds: int) -> None:
        """Set the clock to the right time plus so many seconds."""
        self._page[:] = struct.pack("@l", seconds)
