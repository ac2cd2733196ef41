"""What a test does when a real neighbour is missing: a skip that says why on a laptop, a failure in CI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from ssvm_worker.demo.ports import free_port

__all__ = ["ROOT", "free_port", "missing", "open_handles"]

#: The project's directory.
ROOT = Path(__file__).resolve().parent.parent


def missing(what: str, how: str) -> NoReturn:
    """End the test because *what* is not installed; *how* says how to get it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, and CI may not skip: {how}", pytrace=False)
    pytest.skip(f"{what} is missing: {how}")


def open_handles(below: Path) -> list[str]:
    """Return the handles of this process on files below a directory; threads of other tests have others."""
    handles = []
    for handle in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{handle}").startswith(str(below)):
                handles.append(handle)
        except FileNotFoundError:  # closed since
            continue
    return sorted(handles)
