"""The file in an export that tells it from every other, and from the bare directory under its mount.

The first worker that ever uses an export gives it a random id; each host remembers the id that it saw first.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path

from ssvm_worker.errors import StoreAway

MARKER = ".ssvm-store"
_MOST = 4096


def prove(root: int, remembered: Path, source: str) -> None:
    """Return if the export behind that handle is the one that this host knows, or the first that it sees there.

    Raises StoreAway if it is another one: a server that exports a directory before its disk is there; OSError.
    """
    known, found = _text(remembered), _read(root)
    if found is None and known is None:
        found = _place(root)
    if not found or (known is not None and found != known):
        what = "has no marker" if found is None else "has another marker"
        raise StoreAway(
            f"Not the export that this host knows: it {what}",
            f"{source}/{MARKER}",
            f"See what the server exports; if the export was replaced on purpose, remove {remembered}",
        )
    if known is None:
        _remember(remembered, found)


def _read(root: int) -> str | None:
    """The id in the export, empty for a marker that cannot be understood; None if there is none."""
    try:
        handle = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=root)
    except FileNotFoundError:
        return None
    try:
        values = json.loads(os.read(handle, _MOST))
        return str(values["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    finally:
        os.close(handle)


def _place(root: int) -> str | None:
    """Make the marker, whole or not at all; whoever comes second takes the first one's."""
    id_ = uuid.uuid4().hex
    part = f".{MARKER}.{id_}.0.part"  # as parts are named, so that a sweep finds what a killed worker leaves
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640, dir_fd=root)
    try:
        os.write(handle, json.dumps({"format": 1, "id": id_}).encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(part, MARKER, src_dir_fd=root, dst_dir_fd=root)
    finally:
        os.unlink(part, dir_fd=root)
    os.fsync(root)
    return _read(root)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _remember(path: Path, id_: str) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(id_ + "\n")
    fresh.replace(path)
