"""Read files of this machine, from directories that the settings allow and on paths without symbolic links."""

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
)
from ssvm_worker.streaming.interfaces import CHUNK

from .options import SourceOptions, empty_file, require_complete_body

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: O_NONBLOCK: the open of a pipe would otherwise block until a writer opens it.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class FileVersion:
    """Identity of one version of a file."""

    inode: int
    size: int
    modified_ns: int


class FileSource:
    """``Source`` of a regular file."""

    resumable = True

    def __init__(self, url: str, options: SourceOptions, version: FileVersion | None = None) -> None:
        """Check the path without opening it. Raises InvalidRequest if it is not below an allowed directory."""
        self._root, self._names = _split_path(url, options.directories)
        self.name = f"file://{Path(self._root, *self._names)}"
        self.validator = version
        self.size = version.size if version else None
        self._check = options.check

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on.

        Raises SourceNotFound, SourceDenied, SourceChanged or SourceUnavailable.
        """
        with self._translating(), self._opened() as handle:
            self._compare(os.fstat(handle), offset)
            assert self.size is not None
            position = offset
            while position < self.size and (chunk := os.pread(handle, min(CHUNK, self.size - position), position)):
                self._check()
                position += len(chunk)
                yield chunk
            self._compare(os.fstat(handle), position)
        require_complete_body(position, self.size, self.name)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Yield a handle of the file. Open each directory relative to its parent, and follow no link."""
        handles = [os.open(self._root, _OPEN_DIRECTORY)]
        try:
            for name in self._names[:-1]:
                handles.append(os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=handles[-1]))
            handles.append(os.open(self._names[-1], _OPEN_FILE, dir_fd=handles[-1]))
            yield handles[-1]
        finally:
            for handle in handles:
                os.close(handle)

    def _compare(self, seen: os.stat_result, offset: int) -> None:
        if not stat.S_ISREG(seen.st_mode):
            raise SourceDenied("The path is not a regular file", self.name, "Give the path of a regular file")
        version = FileVersion(seen.st_ino, seen.st_size, seen.st_mtime_ns)
        if offset and version != self.validator:
            raise SourceChanged("The file has changed since the download began", self.name, "Submit the job again")
        self.validator, self.size = version, version.size
        if not self.size:
            raise empty_file(self.name)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                what = "The file does not exist, or its path contains a symbolic link"
                raise SourceNotFound(what, self.name, "Check the path") from error
            if error.errno in (errno.ELOOP, errno.EACCES, errno.EPERM):
                remedy = "Check the file's mode. Symbolic links are not followed"
                raise SourceDenied(f"The file cannot be opened: {error.strerror}", self.name, remedy) from error
            what = f"The file cannot be read: {error.strerror}"
            raise SourceUnavailable(what, self.name, "Check the file system") from error


def _split_path(url: str, allowed: tuple[Path, ...]) -> tuple[Path, tuple[str, ...]]:
    """Return the allowed directory, and the names below it."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    names = path.split("/")[1:]
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
        raise InvalidRequest("The URL does not name a file of this machine", "url", "Give file:///absolute/path")
    if not path.startswith("/") or set(names) & {"", ".", ".."}:
        raise InvalidRequest("The path is not absolute and plain", "url", "Give file:///absolute/path without . or ..")
    for root in allowed:
        above = root.parts[1:]
        if tuple(names[: len(above)]) == above and len(names) > len(above):
            return root, tuple(names[len(above) :])
    raise InvalidRequest(
        "The file is not in an allowed directory", "url", "Add its directory to download.allow_directories"
    )
