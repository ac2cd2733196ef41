"""A directory tree with safe access: no access leaves the tree, and none follows a symbolic link.

The code opens each directory relative to the handle of its parent. A path is a list of names below the root. Another
process may rename files between two calls, but a handle always means the same directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.errors import StoreDenied, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.stores.sorted_listing import is_key

#: The modes of directories. Those of a store that other users read have the second.
_DIR_MODE, _SHARED_DIR_MODE = 0o750, 0o755
#: The maximum depth of directories. The worker's layout has five levels. A walk recurses once for each level, and
#: Python limits the recursion.
_MAX_DEPTH = 64
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: The remedy for a full store.
MAKE_ROOM = "Delete artifacts (`ssvm list`, `ssvm delete`), or enlarge the file system or its quota"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
#: Errors of an open with O_NOFOLLOW if the entry has the wrong type: a symbolic link, or a directory instead of a file
#: or a file instead of a directory.
WRONG_TYPE = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMLINK}


def translated(error: OSError, location: str) -> WorkerError:
    """Return the worker's error for an error of the file system.

    Full and denied are permanent. All others are temporary, for example ESTALE, EIO or an unreachable server.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        return StoreFull(f"The store is full: {reason}", location, MAKE_ROOM)
    if error.errno in _DENIED:
        remedy = "Give the worker's user the right to write there"
        if error.errno == errno.EROFS:
            remedy = "If only the worker cannot write there, add the directory to ReadWritePaths of its systemd unit"
        return StoreDenied(f"The store denies access: {reason}", location, remedy)
    if error.errno in WRONG_TYPE:
        what = f"The path has an entry of another type: {reason}"
        return StoreDenied(what, location, "Remove the entry; the worker never follows symbolic links")
    return StoreUnavailable(f"The store fails: {reason}", location, "Check its mount and the server's log")


@contextlib.contextmanager
def translating(location: str) -> Iterator[None]:
    """Translate errors of the file system to the worker's errors while the block runs."""
    try:
        yield
    except OSError as error:
        raise translated(error, location) from error


@dataclass(frozen=True)
class TreeFile:
    """A regular file in the tree."""

    path: tuple[str, ...]
    size: int
    modified: float
    #: The time of the last write or rename.
    changed: float


class DirectoryTree:
    """The directories and files below *root*. Methods raise OSError, or StoreUnavailable if the root is missing."""

    def __init__(self, root: Path, *, shared: bool = False) -> None:
        """*shared*: all users may read new directories and files, with any umask."""
        self.root = root
        self.shared = shared

    @contextlib.contextmanager
    def open(self, path: Sequence[str] = (), *, make: bool = False) -> Iterator[int]:
        """Open a directory while the block runs. *make* creates it and its parents, but never the root."""
        handle = self._open_root()
        try:
            for name in path:
                child = self._open_child(handle, name, make)
                os.close(handle)
                handle = child
            yield handle
        finally:
            os.close(handle)

    def prune(self, path: Sequence[str]) -> None:
        """Remove the directory and its parents as far as they are empty, but not the root. Ignore errors."""
        with contextlib.suppress(OSError, WorkerError):
            for depth in range(len(path), 0, -1):
                with self.open(path[: depth - 1]) as parent:
                    os.rmdir(path[depth - 1], dir_fd=parent)

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[TreeFile]:
        """Yield the regular files below a directory, sorted by their paths. A missing directory is empty.

        Holds the entries of one directory for each level. An unreadable directory raises an error after all other
        files: the error must not hide them. Raises any other OSError at once.
        """
        denied: list[OSError] = []
        yield from self._walk(path, denied)
        if denied:
            raise denied[0]

    def _walk(self, path: tuple[str, ...], denied: list[OSError]) -> Iterator[TreeFile]:
        try:
            with self.open(path) as handle, os.scandir(handle) as entries:
                found = sorted(_sortable(path, entries))
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _DENIED | WRONG_TYPE:
                raise
            denied.append(error)
            return
        for name, file in found:  # names are unique, so the sort never compares files
            if file is None:
                yield from self._walk((*path, name.rstrip("/")), denied)
            else:
                yield file

    def _open_child(self, parent: int, name: str, make: bool) -> int:
        try:
            return os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
        is_new = False
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, _DIR_MODE, dir_fd=parent)
            is_new = True
            os.fsync(parent)
        child = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
        if is_new and self.shared:
            os.fchmod(child, _SHARED_DIR_MODE)
        return child

    def _open_root(self) -> int:
        try:
            return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            remedy = "Check that it is mounted, or create it. The worker does not create it"
            raise StoreUnavailable("The store's directory does not exist", str(self.root), remedy) from error


def _sortable(path: tuple[str, ...], entries: Iterable[os.DirEntry[str]]) -> Iterator[tuple[str, TreeFile | None]]:
    """Yield the names of files, and of directories with a slash. The slash sorts a directory like the keys below it.

    Omits directories that no key can name: ``.snapshot``, lost+found, unusual characters, and too deep trees.
    """
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if is_key(entry.name) and len(path) < _MAX_DEPTH and (path or entry.name != "lost+found"):
                yield f"{entry.name}/", None
        elif entry.is_file(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):
                seen = entry.stat(follow_symlinks=False)
                yield entry.name, TreeFile((*path, entry.name), seen.st_size, seen.st_mtime, seen.st_ctime)
