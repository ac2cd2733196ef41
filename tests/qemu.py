"""qemu-img, an independent check of disk images."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.neighbours import missing


def assert_same_disk(image: Path, format_: str, raw: Path) -> None:
    """Check that the image is intact, and contains the same as the raw disk."""
    if shutil.which("qemu-img") is None:
        missing("qemu-img", "apt-get install qemu-utils")
    if format_ != "raw":
        check = subprocess.run(["qemu-img", "check", "-f", format_, image], capture_output=True, text=True, check=False)
        assert check.returncode == 0, check.stdout + check.stderr
    command = ["qemu-img", "compare", "-f", format_, "-F", "raw", image, raw]
    compare = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "identical" in compare.stdout, compare.stdout + compare.stderr
