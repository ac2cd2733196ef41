"""Files of this machine, below the directories that the settings allow, on paths without a symbolic link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ssvm_worker.errors import (
    InvalidRequest,
    SourceChanged,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    WorkerError,
)
from ssvm_worker.streaming.interfaces import CHUNK

from .ending import empty, whole
from .options import SourceOptions

_STEP = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Not blocking: the open of a pipe would wait for its other end.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class FileVersion:
    """Tells one state of a file from another."""

    inode: int
    size: int
    modified_ns: int


class FileSource:
    """A ``Source`` of a regular file."""

    resumable = True

    def __init__(self, url: str, access: SourceOptions, version: FileVersion | None = None) -> None:
        """Raises InvalidRequest for a path that is not below an allowed directory; touches nothing."""
        self._root, self._path = _place(url, access.directories)
        self.name = f"file://{Path(self._root, *self._path)}"
        self.validator = version
        self.size = version.size if version else None
        self._check = access.check

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on; SourceNotFound, SourceDenied, SourceChanged, SourceUnavailable."""
        with self._translated(), self._opened() as handle:
            self._compare(os.fstat(handle), offset)
            assert self.size is not None
            position = offset
            while position < self.size and (chunk := os.pread(handle, min(CHUNK, self.size - position), position)):
                self._check()
                position += len(chunk)
                yield chunk
            self._compare(os.fstat(handle), position)
        whole(position, self.size, self.name)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The handle of the file: every step is taken from the directory above, and follows no link."""
        handles = [os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        try:
            for name in self._path[:-1]:
                handles.append(os.open(name, _STEP, dir_fd=handles[-1]))
            handles.append(os.open(self._path[-1], _FILE, dir_fd=handles[-1]))
            yield handles[-1]
        finally:
            for handle in handles:
                os.close(handle)

    def _compare(self, seen: os.stat_result, offset: int) -> None:
        if not stat.S_ISREG(seen.st_mode):
            raise SourceDenied("This is no regular file", self.name, "Give the file itself")
        version = FileVersion(seen.st_ino, seen.st_size, seen.st_mtime_ns)
        if offset and version != self.validator:
            raise SourceChanged("The file has changed since its first bytes came", self.name, "Ask again")
        self.validator, self.size = version, version.size
        if not self.size:
            raise empty(self.name)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _translate(error, self.name) from error


def _translate(error: OSError, where: str) -> WorkerError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return SourceNotFound("There is no such file, or a link is on the way to it", where, "Look at the path")
    if error.errno in (errno.ELOOP, errno.EACCES, errno.EPERM):
        return SourceDenied(
            f"The file cannot be opened: {error.strerror}",
            where,
            "Symbolic links are not followed; else look at its mode",
        )
    return SourceUnavailable(f"The file cannot be read: {error.strerror}", where, "Look at its mount")


def _place(url: str, allowed: tuple[Path, ...]) -> tuple[Path, tuple[str, ...]]:
    """The allowed directory, and the names below it."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    names = path.split("/")[1:]
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
        raise InvalidRequest("This names no file of this machine", "url", "Give file:///absolute/path")
    if not path.startswith("/") or set(names) & {"", ".", ".."}:
        raise InvalidRequest("The path is not absolute and plain", "url", "Give file:///absolute/path without . and ..")
    for root in allowed:
        above = root.parts[1:]
        if tuple(names[: len(above)]) == above and len(names) > len(above):
            return root, tuple(names[len(above) :])
    raise InvalidRequest("Files may not come from there", "url", "List its directory in download.allow_directories")
