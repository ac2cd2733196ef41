"""Scratch folders of running jobs: one each, removed at its end; what dead workers have left goes with the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

#: Seconds for which a new folder may be without its lock.
_YOUNG_S = 60.0


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder of its own below *parent*, absolute, and locked while this process lives."""
    _remove_dead(parent, prefix)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        _lock(folder, stack)
        yield folder


def _lock(folder: Path, stack: ExitStack) -> None:
    """Hold the folder's lock, which the kernel lets go of when this process dies; OSError if another holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_dead(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), ExitStack() as stack:
            if time.time() - folder.stat().st_mtime > _YOUNG_S:
                _lock(folder, stack)
                shutil.rmtree(folder, ignore_errors=True)
