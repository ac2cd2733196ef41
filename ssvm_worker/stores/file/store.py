"""An image store in a directory; it works on any mounted file system.

Bytes go to a hidden part in the final directory (see ``part``). A commit is: fsync, a close that is checked, the size
read back, rename, fsync of the directory, and the size read back once more, under the object's own name. Any failed
write, fsync or close is final: on NFS, ENOSPC is told once, by the write, and a later fsync and close say that all is
well.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import (
    ObjectNotFound,
    Permanent,
    SourceChanged,
    SourceUnavailable,
    StoreAway,
    StoreFull,
    StoreUnavailable,
)
from ssvm_worker.stores.sorted_listing import check_prefix, is_key
from ssvm_worker.streaming.interfaces import CHUNK, Owner, Store, StoredObject, StoreUsage

from .part_file import FileSink, ObjectPath, PartName, begin, job_in_name
from .tree import IN_THE_WAY, DirectoryTree, TreeFile, translated, translating

#: An emptied directory is pruned, so whoever makes one may lose it at once to somebody else's clean-up.
_TRIES = 3
#: A silly-rename of the Linux client: the file's id and a counter (fs/nfs/unlink.c).
_SILLY = re.compile(r"\.nfs[0-9a-f]{24}")


class FileStore:
    """The objects below *root*, which must exist; no symbolic link below it is ever followed."""

    resumable = True

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.url = f"file://{root}"
        self._tree = DirectoryTree(root)

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
        """See Store. Takes the part over from an older writer of the same job, whose commit is then Cancelled."""
        place = ObjectPath(self._tree, check_key(key), self._where(key))
        sink = self._begin(place, owner, resume)
        try:
            if max_bytes is not None:
                sink.cut(max_bytes)
            self._make_room(place.where, (size_hint or 0) - sink.offset)
        except BaseException as error:
            # Bytes of an earlier attempt stay, unless the job has failed for good: the next attempt needs them.
            if sink.offset and not isinstance(error, Permanent):
                sink.suspend()
            else:
                sink.abort()
            raise
        return sink

    def reader(self, key: str) -> FileReader:
        """See Store. An object that is overwritten meanwhile is read to its old end."""
        return FileReader(ObjectPath(self._tree, check_key(key), self._where(key)))

    def handle(self, key: str) -> int:
        """A handle of the object's file, which the caller closes; ObjectNotFound for anything else."""
        reader = self.reader(key)
        with _translating_missing(reader.name):
            return reader.handle()

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        place = ObjectPath(self._tree, check_key(key), self._where(key))
        with _translating_missing(place.where), self._tree.open(place.directory) as directory:
            seen = os.stat(place.name, dir_fd=directory, follow_symlinks=False)
        _check_regular(seen, place.where)
        return StoredObject(key, seen.st_size, modified=seen.st_mtime)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store. Holds the entries of one directory for each level."""
        with translating(self._where(prefix)):
            for found in self._tree.walk(_names(prefix)):
                key = "/".join(found.path)
                if is_key(key):
                    yield StoredObject(key, found.size, modified=found.modified)

    def delete(self, key: str) -> None:
        """See Store. Directories that become empty go too."""
        place = ObjectPath(self._tree, check_key(key), self._where(key))
        with translating(place.where):
            self._remove((*place.directory, place.name))

    def sweep(self, older_than_s: float, prefix: str = "", *, spare: str = "") -> int:
        """See Store. A part is as old as its last write, by the file server's clock; 0 takes parts of any age.

        So are the names under which an NFS client keeps what was removed while it was open, since they were given;
        left behind by one that crashed, nobody else removes them.
        """
        limit, spared, swept = time.time() - older_than_s, job_in_name(spare) if spare else None, 0
        with translating(self._where(prefix)):
            for found in self._tree.walk(_names(prefix)):
                part = _part(found)
                if _is_silly(found) and found.changed <= limit:
                    swept += self._remove_silly(found.path)
                elif part and part.job != spared and (not older_than_s or found.modified <= limit):
                    swept += self._remove(found.path)
        return swept

    def leftovers(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Store."""
        with translating(self._where(prefix)):
            for found in self._tree.walk(_names(prefix)):
                if part := _part(found):
                    yield StoredObject("/".join((*found.path[:-1], part.name)), found.size, modified=found.modified)
                elif _is_silly(found):
                    yield StoredObject("/".join(found.path), found.size, modified=found.changed)

    def usage(self) -> StoreUsage:
        """See Store; *free* is what an unprivileged user can take."""
        with translating(self.name), self._tree.open() as root:
            seen = os.statvfs(root)
        unit = seen.f_frsize
        return StoreUsage(seen.f_blocks * unit, (seen.f_blocks - seen.f_bfree) * unit, seen.f_bavail * unit)

    def _where(self, key: str) -> str:
        return f"{self.name}:{key}"

    def _begin(self, place: ObjectPath, owner: Owner, resume: bool) -> FileSink:
        with translating(place.where):
            for _ in range(_TRIES - 1):
                with contextlib.suppress(FileNotFoundError):
                    return begin(place, owner, resume)
            return begin(place, owner, resume)

    def _make_room(self, where: str, size: int) -> None:
        free = self.usage().free or 0
        if size > free:
            raise StoreFull(
                f"The store is full: {size} bytes do not fit into the {free} that are free",
                where,
                "Make room on it, or raise the quota, then retry",
            )

    def _remove(self, path: tuple[str, ...]) -> bool:
        """Whether there was such a file."""
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
            return False  # a process of this host has it open


def _part(found: TreeFile) -> PartName | None:
    """The part that the file is; None for a file of others, as for a part of what can be no key."""
    part = PartName.parse(found.path[-1])
    return part if part and is_key(part.name) else None


def _is_silly(found: TreeFile) -> bool:
    return _SILLY.fullmatch(found.path[-1]) is not None


class FileReader:
    """See Source; holds a handle while it is open."""

    resumable = True

    def __init__(self, place: ObjectPath) -> None:
        self.name = place.where
        self.size: int | None = None
        self._place = place
        self._first: tuple[int, ...] | None = None

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
        """The open file, which the caller closes; OSError, and ObjectNotFound for what is no regular file."""
        handle = self._open()
        try:
            _check_regular(os.fstat(handle), self.name)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _open(self) -> int:
        with self._place.tree.open(self._place.directory) as directory:
            # Non-blocking, so that a pipe in the object's place cannot hold us.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(self._place.name, flags, dir_fd=directory)

    def _chunks(self, handle: int, offset: int) -> Iterator[bytes]:
        self._check_same(os.fstat(handle))
        os.lseek(handle, offset, os.SEEK_SET)
        left = (self.size or 0) - offset
        while left > 0:
            chunk = os.read(handle, min(CHUNK, left))
            if not chunk:
                raise SourceUnavailable(f"The object ended {left} bytes early", self.name, "Verify the artifact")
            left -= len(chunk)
            yield chunk

    def _check_same(self, seen: os.stat_result) -> None:
        _check_regular(seen, self.name)
        identity = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
        if self._first not in (None, identity):
            raise SourceChanged("The object was overwritten while it was read", self.name, "Ask again")
        self._first, self.size = identity, seen.st_size


@contextlib.contextmanager
def _translating_missing(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectNotFound("There is no such object", where, "`ssvm list` tells what is there") from error
    except OSError as error:
        if error.errno in (*IN_THE_WAY, errno.ENXIO):  # the last one for a socket
            raise _no_object(where) from error
        raise translated(error, where) from error


def _no_object(where: str) -> ObjectNotFound:
    return ObjectNotFound(
        "There is no object, but something else: a directory, a symbolic link, a pipe or a device",
        where,
        "Symbolic links are never followed. Remove it, and restore the object from another store",
    )


def _check_regular(seen: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(seen.st_mode):
        raise _no_object(where)


def _names(prefix: str) -> tuple[str, ...]:
    return tuple(name for name in check_prefix(prefix).split("/") if name)
