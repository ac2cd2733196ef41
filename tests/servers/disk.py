"""A small file system that a test can fill completely. The kernel then reports ENOSPC."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from tests.neighbours import missing

_PIECE = 64 * 1024


def may_mount() -> bool:
    """Return whether this process may mount file systems."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def require_mounts() -> None:
    """Skip the test if this process may not mount file systems."""
    if not may_mount():
        missing("the right to mount", "run the test as root, in a container with CAP_SYS_ADMIN")


class SmallDisk:
    """A tmpfs of *size* bytes at *directory*. It is mounted until ``close``."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "none", str(directory)]
        subprocess.run(command, check=True)

    def fill(self, leave: int = 0) -> None:
        """Fill the disk except for *leave* bytes."""
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while self.free > leave:
                file.write(bytes(min(_PIECE, self.free - leave)))

    def empty(self) -> None:
        """Free the space again."""
        self._ballast.unlink(missing_ok=True)

    @property
    def free(self) -> int:
        """Return the free bytes."""
        seen = os.statvfs(self._directory)
        return seen.f_bavail * seen.f_frsize

    @property
    def _ballast(self) -> Path:
        """Return a name that no key can have, so no store lists it."""
        return self._directory / ".ballast"

    def close(self) -> None:
        """Unmount the disk, even if a process uses it."""
        subprocess.run(["umount", "--lazy", str(self._directory)], check=False)
