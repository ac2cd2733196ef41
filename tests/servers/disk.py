"""A file system of a few megabytes that can be filled to its last byte: ENOSPC as the kernel says it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from tests.neighbours import missing

_PIECE = 64 * 1024


def may_mount() -> bool:
    """Whether this process may mount file systems."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def require_mounts() -> None:
    """End the test if this process may not mount file systems."""
    if not may_mount():
        missing("the right to mount", "run the test as root, in a container with CAP_SYS_ADMIN")


class SmallDisk:
    """A tmpfs of *size* bytes mounted on *directory*, until ``close``."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "none", str(directory)]
        subprocess.run(command, check=True)

    def fill(self, leave: int = 0) -> None:
        """Take all the room but for *leave* bytes."""
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while self.free > leave:
                file.write(bytes(min(_PIECE, self.free - leave)))

    def empty(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    @property
    def free(self) -> int:
        """Bytes that still fit."""
        seen = os.statvfs(self._directory)
        return seen.f_bavail * seen.f_frsize

    @property
    def _ballast(self) -> Path:
        """No key can be its name, so no store shows it."""
        return self._directory / ".ballast"

    def close(self) -> None:
        """Unmount, whoever is still there."""
        subprocess.run(["umount", "--lazy", str(self._directory)], check=False)
