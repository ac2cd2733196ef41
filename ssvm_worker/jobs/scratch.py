"""Scratch folders of running jobs. Each new folder also removes the folders of dead workers."""

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

#: A folder of this age, in seconds, must be locked. A younger one may not be locked yet.
_YOUNG_S = 60.0


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield the absolute path of a new folder below *parent*, and remove the folder after the block.

    The folder is locked while this process lives.
    """
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), ExitStack() as stack:
            if time.time() - folder.stat().st_mtime > _YOUNG_S:
                _lock(folder, stack)
                shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        _lock(folder, stack)
        yield folder


def _lock(folder: Path, stack: ExitStack) -> None:
    """Lock the folder until the stack closes or this process dies. Raise OSError if another process holds the lock."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
