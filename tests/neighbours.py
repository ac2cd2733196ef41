"""What a test does when a real neighbour is missing: a skip that says why on a laptop, a failure in CI."""

from __future__ import annotations

import os
import socket
from typing import NoReturn

import pytest


def missing(what: str, how: str) -> NoReturn:
    """End the test because *what* is not installed; *how* tells the reader to get it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, and CI may not skip: {how}", pytrace=False)
    pytest.skip(f"{what} is missing: {how}")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
