"""Let the worker use the files that a command of root creates in the state directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def give_to_owner(path: Path, handle: int | None = None) -> None:
    """Give a file or directory of root to the owner of the directory that contains it.

    `ssvm doctor` often runs as root before the worker, which is another user, uses the store. *handle* is that of an
    open file, which may have existed before. A file with a second name keeps its owner.
    """
    if os.geteuid() != 0:
        return
    owner, found = path.parent.stat(), os.lstat(path) if handle is None else os.fstat(handle)
    if found.st_uid != 0 or owner.st_uid == 0 or (stat.S_ISREG(found.st_mode) and found.st_nlink != 1):
        return
    if handle is None:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    else:
        os.fchown(handle, owner.st_uid, owner.st_gid)
