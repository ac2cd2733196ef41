"""How the bytes of a source end: all of them have come, or it is an error."""

from __future__ import annotations

from ssvm_worker.errors import SourceNotFound, SourceUnavailable


def whole(position: int, size: int | None, name: str) -> int:
    """The size of what has ended at *position*, where *size* was announced or nothing was.

    Raises SourceUnavailable if that is not all, SourceNotFound if there is nothing.
    """
    if size is not None and position != size:
        raise SourceUnavailable(f"The bytes ended at {position} of {size}", name, "Look at the server")
    if not position:
        raise empty(name)
    return position


def empty(name: str) -> SourceNotFound:
    """The error for a file of no bytes: nobody means one."""
    return SourceNotFound("The file is empty", name, "Look at where it comes from")
