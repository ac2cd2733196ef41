"""An image store in a directory of any mounted file system.

A writer writes to a hidden part in the final directory (see ``part_file``). A commit has these steps:

1. fsync and close the part, and check both results
2. read back the size
3. rename the part
4. fsync the directory
5. read back the size under the object's name

A failed write, fsync or close is final. On NFS only the write reports ENOSPC; a later fsync and close succeed.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import re
import stat
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from ssvm_worker.artifacts.layout import check_foreign_key, check_key
from ssvm_worker.errors import (
    ObjectNotFound,
    Permanent,
    SourceChanged,
    SourceUnavailable,
    StoreAway,
    StoreFull,
    StoreUnavailable,
)
from ssvm_worker.stores.sorted_listing import check_prefix, is_key, passes
from ssvm_worker.streaming.interfaces import BURST, CHUNK, Owner, Store, StoredObject, StoreUsage
from ssvm_worker.units import human_size

from .part_file import FileSink, ObjectPath, PartName, begin, job_in_name
from .tree import MAKE_ROOM, WRONG_TYPE, DirectoryTree, TreeFile, translated, translating

#: The number of tries to begin a part. The store prunes empty directories, so another process may remove a new one.
_TRIES = 3
#: A silly-rename of the Linux NFS client: the file's id and a counter (fs/nfs/unlink.c). The client renames a removed
#: file to such a name while a process has the file open.
_SILLY = re.compile(r"\.nfs[0-9a-f]{24}")


class FileStore:
    """The objects below *root*, which must exist. The store never follows a symbolic link below it."""

    resumable = True
    chunk_size = BURST

    def __init__(self, name: str, root: Path, *, shared: bool = False) -> None:
        """*shared*: all users of the machine may read what this store writes."""
        self.name = name
        self.url = f"file://{root}"
        self._tree = DirectoryTree(root, shared=shared)
        self._check = check_key

    def lenient(self) -> FileStore:
        """See HoldsForeign."""
        twin = copy.copy(self)
        twin._check = check_foreign_key
        return twin

    def writer(
        self,
        key: str,
        size_hint: int | None = None,
        *,
        owner: Owner,
        resume: bool = False,
        max_bytes: int | None = None,
        copy_from: Store | None = None,  # noqa: ARG002
    ) -> FileSink:
        """See Store. The sink takes over the part of an older writer of the job. That writer's commit is Cancelled."""
        path = self._path(key)
        sink = self._begin(path, owner, resume)
        try:
            if max_bytes is not None:
                sink.truncate(max_bytes)
            self._check_room(path.location, (size_hint or 0) - sink.offset)
        except BaseException as error:
            # The next attempt needs the bytes of an earlier attempt. After a permanent error there is none.
            if sink.offset and not isinstance(error, Permanent):
                sink.suspend()
            else:
                sink.abort()
            raise
        return sink

    def reader(self, key: str) -> FileReader:
        """See Store. If the object is overwritten during the read, the reader returns the old bytes."""
        return FileReader(self._path(key))

    def handle(self, key: str) -> int:
        """Open the object's file. The caller closes the handle. Raise ObjectNotFound for any other entry."""
        reader = self.reader(key)
        with _translating_missing(reader.name):
            return reader.handle()

    @property
    def root(self) -> Path:
        """The directory of the store: the mount point of an NFS export."""
        return self._tree.root

    def file(self, key: str) -> Path:
        """Return the path of the object's file, for programs of this host. Raise ObjectNotFound if there is none."""
        self.stat(key)
        return self._tree.root / key

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        path = self._path(key)
        with _translating_missing(path.location), self._tree.open(path.directory) as directory:
            seen = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
        _check_regular(seen, path.location)
        return StoredObject(key, seen.st_size, modified=seen.st_mtime)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store. Holds the entries of one directory for each level."""
        with translating(self._location(prefix)):
            for found in self._tree.walk(_names(prefix)):
                key = "/".join(found.path)
                if passes(self._check, key):
                    yield StoredObject(key, found.size, modified=found.modified)

    def foreign(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield the files below *prefix* that ``list`` omits because of their names. No part is among them."""
        with translating(self._location(prefix)):
            for found in self._tree.walk(_names(prefix)):
                key = "/".join(found.path)
                if not is_key(key) and not found.path[-1].startswith("."):
                    yield StoredObject(key, found.size, modified=found.modified)

    def delete_foreign(self, key: str) -> None:
        """Delete a file that ``foreign`` has found. A missing file is no error."""
        with translating(self._location(key)):
            self._remove(tuple(key.split("/")))

    def delete(self, key: str) -> None:
        """See Store. The store also removes directories that become empty."""
        path = self._path(key)
        with translating(path.location):
            self._remove((*path.directory, path.name))

    def rename(self, key: str, to: str) -> None:
        """Rename an object at once, and replace an object of the new name. Raise ObjectNotFound if it is missing."""
        old, new = self._path(key), self._path(to)
        with _translating_missing(old.location), self._tree.open(old.directory) as source:
            _check_regular(os.stat(old.name, dir_fd=source, follow_symlinks=False), old.location)
            with self._tree.open(new.directory, make=True) as target:
                os.rename(old.name, new.name, src_dir_fd=source, dst_dir_fd=target)
                os.fsync(target)
            os.fsync(source)
        self._tree.prune(old.directory)

    def sweep(self, older_than_s: float, prefix: str = "", *, spare: str = "") -> int:
        """See Store. The age of a part counts from its last write, by the file server's clock. 0 means any age.

        The sweep also removes silly-renamed files by the age of their rename. A crashed NFS client leaves such files,
        and no other process removes them.
        """
        limit, spared, swept = time.time() - older_than_s, job_in_name(spare) if spare else None, 0
        with translating(self._location(prefix)):
            for found in self._tree.walk(_names(prefix)):
                part = _part(found)
                if _is_silly(found) and found.changed <= limit:
                    swept += self._remove_silly(found.path)
                elif part and part.job != spared and (not older_than_s or found.modified <= limit):
                    swept += self._remove(found.path)
        return swept

    def leftovers(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store."""
        with translating(self._location(prefix)):
            for found in self._tree.walk(_names(prefix)):
                if part := _part(found):
                    yield StoredObject("/".join((*found.path[:-1], part.name)), found.size, modified=found.modified)
                elif _is_silly(found):
                    yield StoredObject("/".join(found.path), found.size, modified=found.changed)

    def usage(self) -> StoreUsage:
        """See Store. *free* is the space that an unprivileged user can use."""
        with translating(self.name), self._tree.open() as root:
            seen = os.statvfs(root)
        unit = seen.f_frsize
        return StoreUsage(seen.f_blocks * unit, (seen.f_blocks - seen.f_bfree) * unit, seen.f_bavail * unit)

    def _location(self, key: str) -> str:
        return f"{self.name}:{key}"

    def _path(self, key: str) -> ObjectPath:
        return ObjectPath(self._tree, self._check(key), self._location(key))

    def _begin(self, path: ObjectPath, owner: Owner, resume: bool) -> FileSink:
        with translating(path.location):
            for _ in range(_TRIES - 1):
                with contextlib.suppress(FileNotFoundError):
                    return begin(path, owner, resume)
            return begin(path, owner, resume)

    def _check_room(self, location: str, size: int) -> None:
        free = self.usage().free or 0
        if size > free:
            what = f"The store is full: {human_size(size)} do not fit into {human_size(free)} of free space"
            raise StoreFull(what, location, MAKE_ROOM)

    def _remove(self, path: tuple[str, ...]) -> bool:
        """Remove a file. Return whether the file existed."""
        try:
            with self._tree.open(path[:-1]) as directory:
                os.unlink(path[-1], dir_fd=directory)
                os.fsync(directory)
        except FileNotFoundError:
            return False
        self._tree.prune(path[:-1])
        return True

    def _remove_silly(self, path: tuple[str, ...]) -> bool:
        try:
            return self._remove(path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False  # a process of this host has the file open


def _part(found: TreeFile) -> PartName | None:
    """Return the part's name. Return None for any other file, and for a part whose object name is not a safe key."""
    part = PartName.parse(found.path[-1])
    return part if part and passes(check_foreign_key, part.name) else None


def _is_silly(found: TreeFile) -> bool:
    return _SILLY.fullmatch(found.path[-1]) is not None


class FileReader:
    """See Source. Holds a handle while it is open."""

    resumable = True

    def __init__(self, path: ObjectPath) -> None:
        self.name = path.location
        self.size: int | None = None
        self._path = path
        self._identity: tuple[int, ...] | None = None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """See Source."""
        try:
            with _translating_missing(self.name):
                handle = self._open()
                try:
                    yield from self._chunks(handle, offset)
                finally:
                    os.close(handle)
        except StoreAway:
            raise
        except StoreUnavailable as error:
            raise SourceUnavailable(*error.args) from error

    def handle(self) -> int:
        """Open the file; the caller closes the handle. Raise OSError, or ObjectNotFound if it is not a regular file."""
        handle = self._open()
        try:
            _check_regular(os.fstat(handle), self.name)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _open(self) -> int:
        with self._path.tree.open(self._path.directory) as directory:
            # O_NONBLOCK: a pipe instead of the object must not block this process.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(self._path.name, flags, dir_fd=directory)

    def _chunks(self, handle: int, offset: int) -> Iterator[bytes]:
        seen = os.fstat(handle)
        _check_regular(seen, self.name)
        identity = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
        if self._identity not in (None, identity):
            raise SourceChanged("The object was overwritten while it was read", self.name, "Read it again")
        self._identity, self.size = identity, seen.st_size
        os.lseek(handle, offset, os.SEEK_SET)
        left = (self.size or 0) - offset
        while left > 0:
            chunk = os.read(handle, min(CHUNK, left))
            if not chunk:
                what = f"The object is truncated: it ended {left} bytes early"
                raise SourceUnavailable(what, self.name, "Verify the artifact")
            left -= len(chunk)
            yield chunk


@contextlib.contextmanager
def _translating_missing(location: str) -> Iterator[None]:
    """Translate OSError while the block runs. Raise ObjectNotFound if the path has no regular file."""
    try:
        yield
    except FileNotFoundError as error:
        remedy = "`ssvm list` shows the objects of a store"
        raise ObjectNotFound("The object does not exist", location, remedy) from error
    except OSError as error:
        if error.errno in (*WRONG_TYPE, errno.ENXIO):  # ENXIO: the entry is a socket
            raise _not_regular(location) from error
        raise translated(error, location) from error


def _not_regular(location: str) -> ObjectNotFound:
    return ObjectNotFound(
        "The entry is not an object: it is a directory, a symbolic link, a pipe or a device",
        location,
        "Remove the entry, and restore the object from another store. The worker never follows symbolic links",
    )


def _check_regular(seen: os.stat_result, location: str) -> None:
    if not stat.S_ISREG(seen.st_mode):
        raise _not_regular(location)


def _names(prefix: str) -> tuple[str, ...]:
    return tuple(name for name in check_prefix(prefix).split("/") if name)
