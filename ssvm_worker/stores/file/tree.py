"""A directory tree that is never left: every step is taken from the handle of the directory above, and follows no link.

A path here is a list of names below the root. Between two calls anything may have been renamed by somebody else; a
handle stays what it was.
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

DIR_MODE = 0o750
#: Levels of directories; our layout has five. A walk calls itself for each, which the interpreter limits.
_DEEPEST = 64
_STEP = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
#: What the open of a symbolic link answers under O_NOFOLLOW, and that of a directory or a file in the other's place.
IN_THE_WAY = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMLINK}


def translated(error: OSError, where: str) -> WorkerError:
    """Our error for the file system's: full and denied are final, all else may pass (ESTALE, EIO, a server away)."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        return StoreFull(f"The store is full: {reason}", where, "Make room on it, or raise the quota, then retry")
    if error.errno in _DENIED:
        return StoreDenied(f"The store refuses: {reason}", where, "Give the worker's user the right to write there")
    if error.errno in IN_THE_WAY:
        return StoreDenied(
            f"Something else lies there: {reason}", where, "Move it away; symbolic links are never followed"
        )
    return StoreUnavailable(f"The store does not work: {reason}", where, "Look at its mount and at the server's log")


@contextlib.contextmanager
def translating(where: str) -> Iterator[None]:
    """Raise our errors in place of the file system's."""
    try:
        yield
    except OSError as error:
        raise translated(error, where) from error


@dataclass(frozen=True)
class TreeFile:
    """A regular file in the tree."""

    path: tuple[str, ...]
    size: int
    modified: float
    #: When it was written or renamed last.
    changed: float


class DirectoryTree:
    """What lies below *root*. Raises OSError; only a missing root is translated, for it has a remedy of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def open(self, path: Sequence[str] = (), *, make: bool = False) -> Iterator[int]:
        """The handle of a directory, closed at the end; *make* makes it and those above it, but never the root."""
        handle = self._open_root()
        try:
            for name in path:
                below = _step(handle, name, make)
                os.close(handle)
                handle = below
            yield handle
        finally:
            os.close(handle)

    def prune(self, path: Sequence[str]) -> None:
        """Remove the directory and those above it as far as they are empty, but not the root; failures mean no harm."""
        with contextlib.suppress(OSError, WorkerError):
            for depth in range(len(path), 0, -1):
                with self.open(path[: depth - 1]) as above:
                    os.rmdir(path[depth - 1], dir_fd=above)

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[TreeFile]:
        """Yield every regular file below a directory, sorted as the paths joined by ``/`` sort; a missing one is empty.

        Holds the entries of one directory for each level. A directory that may not be read is an error, but only after
        all the others: it must neither look empty nor hide them. Raises any other OSError at once.
        """
        denied: list[OSError] = []
        yield from self._below(path, denied)
        if denied:
            raise denied[0]

    def _below(self, path: tuple[str, ...], denied: list[OSError]) -> Iterator[TreeFile]:
        try:
            with self.open(path) as handle, os.scandir(handle) as entries:
                found = sorted(_look(path, entries))
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _DENIED | IN_THE_WAY:
                raise
            denied.append(error)
            return
        for name, seen in found:  # names differ, so what was seen is never compared
            if seen is None:
                yield from self._below((*path, name.rstrip("/")), denied)
            else:
                yield seen

    def _open_root(self) -> int:
        try:
            return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreUnavailable(
                "The store's directory does not exist", str(self.root), "Is it mounted? It is not made silently"
            ) from error


def _step(above: int, name: str, make: bool) -> int:
    try:
        return os.open(name, _STEP, dir_fd=above)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, DIR_MODE, dir_fd=above)
        os.fsync(above)
    return os.open(name, _STEP, dir_fd=above)


def _look(path: tuple[str, ...], entries: Iterable[os.DirEntry[str]]) -> Iterator[tuple[str, TreeFile | None]]:
    """Each file, and each directory with a slash behind its name, which makes it sort as the keys below it do."""
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not _foreign(path, entry.name):
            yield f"{entry.name}/", None
        elif entry.is_file(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):
                seen = entry.stat(follow_symlinks=False)
                yield entry.name, TreeFile((*path, entry.name), seen.st_size, seen.st_mtime, seen.st_ctime)


def _foreign(path: tuple[str, ...], name: str) -> bool:
    """Tell directories of others, which no key can name: ``.snapshot``, odd characters, deep trees, lost+found."""
    return not is_key(name) or len(path) >= _DEEPEST or (not path and name == "lost+found")
