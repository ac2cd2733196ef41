"""What every sink of a store has in common: how it is left, and how it is when it cannot resume."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Self


class LeavingAborts:
    """Leaving the ``with`` block aborts; ``abort`` itself does nothing once the sink is committed or suspended."""

    @abstractmethod
    def abort(self) -> None:
        """Leave nothing behind."""

    def settle(self) -> int:
        """Nothing can be relied upon before the commit."""
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()


class CannotResume(LeavingAborts):
    """A sink that starts at the first byte, and whose unfinished bytes are of no use to anybody."""

    offset = 0

    def resumed(self) -> Iterator[bytes]:
        """Nothing."""
        return iter(())

    def suspend(self) -> None:
        """Abort: there is nowhere to keep the bytes."""
        self.abort()
