"""What sinks that cannot resume have in common."""

from __future__ import annotations

from collections.abc import Iterator

from .stream import LeavingAborts

__all__ = ["CannotResume", "LeavingAborts"]


class CannotResume(LeavingAborts):
    """A sink that starts at the first byte, and whose unfinished bytes are of no use to anybody."""

    offset = 0

    def resumed(self) -> Iterator[bytes]:
        """Nothing."""
        return iter(())

    def suspend(self) -> None:
        """Abort: there is nowhere to keep the bytes."""
        self.abort()
