"""Waiting for what nobody tells of."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

#: Only a safety net: nothing is asserted about time. An emulated machine has more (tests/nfs/guest.sh).
PATIENCE_S = float(os.environ.get("PATIENCE_S", "60"))


def until(true: Callable[[], bool], what: str) -> None:
    """Wait until something is true that nobody would tell us of."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.02)
