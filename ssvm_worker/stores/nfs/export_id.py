"""A marker file with a random id in each export. It identifies the export, and detects an unmounted directory.

The first worker that uses an export creates the marker. Each host remembers the id that it saw first.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path

from ssvm_worker.errors import StoreAway
from ssvm_worker.stores.ownership import give_to_owner

MARKER = ".ssvm-store"
_MAX_SIZE = 4096


def prove(root: int, remembered: Path, source: str) -> None:
    """Check that the handle *root* belongs to the export that this host knows. On first use, remember its id.

    Raises OSError. Raises StoreAway for another export: for example, a server exports a directory without its disk.
    """
    known: str | None = None
    with contextlib.suppress(FileNotFoundError):
        known = remembered.read_text().strip()
    found = _read(root)
    if found is None and known is None:
        found = _create(root)
    if not found or (known is not None and found != known):
        what = "has no marker" if found is None else "has another marker"
        raise StoreAway(
            f"Not the export that this host knows: it {what}",
            f"{source}/{MARKER}",
            f"Check the exports of the server. If the export was replaced on purpose, remove {remembered}",
        )
    if known is None:
        fresh = remembered.with_name(f"{remembered.name}.{os.getpid()}")
        fresh.write_text(found + "\n")
        give_to_owner(fresh)
        fresh.replace(remembered)


def _read(root: int) -> str | None:
    """Return the id in the export's marker. The id of an invalid marker is empty. Without a marker return None."""
    try:
        handle = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=root)
    except FileNotFoundError:
        return None
    try:
        values = json.loads(os.read(handle, _MAX_SIZE))
        return str(values["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    finally:
        os.close(handle)


def _create(root: int) -> str | None:
    """Create the marker atomically, and return the export's id. If two workers create it, the first id counts."""
    id_ = uuid.uuid4().hex
    part = f".{MARKER}.{id_}.0.part"  # the name of a part, so that a sweep removes it if the worker is killed
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
