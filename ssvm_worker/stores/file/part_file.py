"""Uncommitted bytes in a directory: a hidden file next to the final name, ``.<name>.<job>.<token>.part``.

This name is the fence. A newer writer of the same job renames or removes the part. So a writer that lost its claim
finds no part to rename at its commit. A newer writer that does not resume creates a new inode: old handles cannot
write to it.

The sink does not write runs of 64 KiB or more zeros. They become holes, which read as zeros and use no space.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock, Thread

from ssvm_worker.errors import Cancelled, StoreUnavailable, WorkerError
from ssvm_worker.streaming.interfaces import CHUNK, LeavingAborts, Owner, StoredObject
from ssvm_worker.units import KiB

from .tree import DirectoryTree, translated, translating

#: The modes of files. Those of a store that other users read have the second.
_FILE_MODE, _SHARED_FILE_MODE = 0o640, 0o644
_PART = re.compile(r"\.(?P<name>.+)\.(?P<job>[A-Za-z0-9_-]+)\.(?P<token>\d+)\.part")
#: Maximum characters of a job id in a part's name. With a key's 180 and a token's 20 the name is below NAME_MAX, 255.
_JOB_LENGTH = 40
#: The minimum run of zeros for a hole. A shorter hole costs more for its extents than it saves in blocks.
HOLE = 64 * KiB
_ZEROS = bytes(HOLE)
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
#: Seconds that an abort waits for the close of the file. On NFS, a close first sends the cached bytes to the server.
_CLOSE_WAIT_S = 1.0


@dataclass(frozen=True)
class PartName:
    """The file name of a part: the object, and the job and token of the writer."""

    name: str
    job: str
    token: int

    def __str__(self) -> str:
        return f".{self.name}.{self.job}.{self.token}.part"

    @classmethod
    def parse(cls, text: str) -> PartName | None:
        """Parse a file name. Return None if it is not the name of a part."""
        match = _PART.fullmatch(text)
        return cls(match["name"], match["job"], int(match["token"])) if match else None


def job_in_name(job_id: str) -> str:
    """Return the job id for a part's name. A long or unusual id is shortened and gets a hash, which makes it unique."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", job_id)
    if plain == job_id and 0 < len(plain) <= _JOB_LENGTH:
        return plain
    return f"{plain[: _JOB_LENGTH - 9]}-{hashlib.sha256(job_id.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class ObjectPath:
    """The path of an object in a tree."""

    tree: DirectoryTree
    key: str
    #: Store and key, for messages.
    location: str

    @property
    def directory(self) -> tuple[str, ...]:
        """The names of the object's directories."""
        return tuple(self.key.split("/")[:-1])

    @property
    def name(self) -> str:
        """The object's file name."""
        return self.key.rsplit("/", 1)[-1]


def begin(path: ObjectPath, owner: Owner, resume: bool) -> FileSink:
    """Create a part, or take over an older part of the same job, and return its sink.

    Raises OSError, and Cancelled if a newer writer of the same job has a part.
    """
    part = PartName(path.name, job_in_name(owner.job_id), owner.token)
    with path.tree.open(path.directory, make=True) as directory:
        names = (PartName.parse(name) for name in os.listdir(directory))
        parts = [each for each in names if each and (each.name, each.job) == (part.name, part.job)]
        if any(each.token > part.token for each in parts):
            raise Cancelled("fenced")
        parts.sort(key=lambda each: each.token)
        newest = parts.pop() if parts and resume else None
        for old in parts:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(str(old), dir_fd=directory)
        if newest:
            os.rename(str(newest), str(part), src_dir_fd=directory, dst_dir_fd=directory)
        flags = _OPEN if newest else _OPEN | os.O_CREAT | os.O_EXCL
        handle = os.open(str(part), flags, _FILE_MODE, dir_fd=directory)
        try:
            if path.tree.shared:
                os.fchmod(handle, _SHARED_FILE_MODE)
            return FileSink(path, str(part), directory, handle)
        except BaseException:
            os.close(handle)
            if not newest:
                with contextlib.suppress(OSError):
                    os.unlink(str(part), dir_fd=directory)
                path.tree.prune(path.directory)
            raise


class _Closed(StoreUnavailable):
    """The sink was aborted, or has ended."""


class _Handle:
    """A descriptor for several threads. It is closed once, and never while a thread uses it.

    Otherwise the kernel could reuse the number for another file during a thread's call.
    """

    def __init__(self, descriptor: int, location: str) -> None:
        self._descriptor = descriptor
        self._location = location
        self._lock = Lock()
        self._users = 0
        self._closing = False

    @contextlib.contextmanager
    def use(self) -> Iterator[int]:
        """Keep the descriptor open while the block runs. Raise _Closed if it is closed."""
        with self._lock:
            if self._closing:
                raise _Closed("The write was aborted", self._location, "Start the transfer again")
            self._users += 1
        try:
            yield self._descriptor
        finally:
            with self._lock:
                self._users -= 1
                is_last = self._closing and not self._users
            if is_last:
                with contextlib.suppress(OSError):  # an abort, or a commit whose fsync has succeeded
                    os.close(self._descriptor)

    def close(self) -> None:
        """Close the descriptor now, or after its last use. May be repeated. Raises OSError."""
        with self._lock:
            is_mine = not self._closing and not self._users
            self._closing = True
        if is_mine:
            os.close(self._descriptor)


class FileSink(LeavingAborts):
    """See Sink. Holds two handles and no bytes. The first error is final: all later calls raise it again.

    Any thread may call ``abort``, ``suspend`` and ``sync`` at any time. They do not wait for calls of other threads.
    """

    def __init__(self, path: ObjectPath, part: str, directory: int, handle: int) -> None:
        """Take ownership of *handle*, and duplicate *directory*. After an OSError the caller closes both."""
        self.key = path.key
        self.offset = os.lseek(handle, 0, os.SEEK_END)
        self._path = path
        self._part = part
        self._identity = _identity(os.fstat(handle))
        self._size = self.offset
        #: The number of zeros at the end of the given bytes that are not in the file yet.
        self._zeros = 0
        #: The number of first bytes that are durable on the disk.
        self._durable = 0
        self._failed: WorkerError | None = None
        #: Guards the fields *_durable* and *_ended*, which ``abort``, ``suspend`` and ``sync`` change.
        self._lock = Lock()
        self._ended = False
        self._directory = _Handle(os.dup(directory), path.location)
        self._file = _Handle(handle, path.location)

    def truncate(self, size: int) -> None:
        """Keep at most the first *size* bytes of the earlier attempt. Call it before the first write."""
        if self.offset > size:
            with translating(self._path.location), self._file.use() as handle:
                os.ftruncate(handle, size)
                self.offset = self._size = os.lseek(handle, 0, os.SEEK_END)

    def write(self, chunk: bytes) -> None:
        """See Sink."""
        with self._keeping_first_error(), self._file.use() as handle:
            for piece, is_zero in _runs(chunk, self._size):
                if is_zero:
                    self._zeros += len(piece)
                    continue
                # Data follows the zeros: make a hole, or write the few zeros.
                if self._zeros >= HOLE:
                    os.lseek(handle, self._zeros, os.SEEK_CUR)
                elif self._zeros:
                    _write_all(handle, memoryview(_ZEROS)[: self._zeros])
                self._zeros = 0
                _write_all(handle, piece)
            self._size += len(chunk)

    def resumed(self) -> Iterator[bytes]:
        """See Sink."""
        done = 0
        while done < self.offset:
            with translating(self._path.location), self._file.use() as handle:
                chunk = os.pread(handle, min(CHUNK, self.offset - done), done)
            if not chunk:
                what = "The bytes of the earlier attempt are missing"
                raise StoreUnavailable(what, self._path.location, "Retry")
            done += len(chunk)
            yield chunk

    def sync(self) -> int:
        """See Sink. An error is final, because the kernel reports it only once: the last fsync would succeed."""
        try:
            with self._file.use() as handle, self._keeping_first_error():
                size = os.fstat(handle).st_size
                os.fdatasync(handle)
        except _Closed:
            return self._durable
        with self._lock:
            if not self._ended:
                self._durable = max(self._durable, size)
            return self._durable

    def commit(self) -> StoredObject:
        """See Sink. Raise Cancelled if a newer writer of the same job has taken the part."""
        with self._keeping_first_error(), self._directory.use() as directory:
            self._flush()
            self._file.close()
            # Check that the part is this sink's file and has the written size.
            try:
                seen = self._stat_part(directory)
            except FileNotFoundError as error:
                raise self._missing_part() from error
            if _identity(seen) != self._identity:
                raise self._missing_part()
            self._check_size(seen)
            modified = seen.st_mtime
            self._rename(directory)
            os.fsync(directory)
            self._check_object(directory)
        self._end()
        self._close(self._directory)
        return StoredObject(self.key, self._size, modified=modified)

    def abort(self) -> None:
        """See Sink. If the part cannot be removed, the sweep removes it: an abort must not hide an earlier error."""
        if not self._end():
            return
        try:
            closing = Thread(target=self._close, args=(self._file,), name="close", daemon=True)
            closing.start()
        except RuntimeError:  # the process cannot start a thread
            self._close(self._file)
        else:
            closing.join(_CLOSE_WAIT_S)
        with contextlib.suppress(OSError, _Closed), self._directory.use() as directory:
            if _identity(self._stat_part(directory)) == self._identity:
                os.unlink(self._part, dir_fd=directory)
        self._close(self._directory)
        self._path.tree.prune(self._path.directory)

    def suspend(self) -> None:
        """See Sink. After a failed write the sink aborts, because the bytes may be wrong."""
        if self._failed or not self._size:
            self.abort()
            return
        if not self._end(keep=True):
            return
        with contextlib.suppress(OSError):
            self._flush()
            self._durable = self._size
        self._close(self._file)
        self._close(self._directory)

    def _end(self, *, keep: bool = False) -> bool:
        """End the sink, and return whether an earlier call had not ended it. *keep* keeps the durable bytes."""
        with self._lock:
            was_ended, self._ended = self._ended, True
            if not was_ended and not keep:
                self._durable = 0
            return not was_ended

    def _close(self, handle: _Handle) -> None:
        with contextlib.suppress(OSError):
            handle.close()

    def _flush(self) -> None:
        """Make all given bytes durable. Zeros at the end become a hole."""
        with self._file.use() as handle:
            if self._zeros:
                os.ftruncate(handle, self._size)
                self._zeros = 0
            os.fsync(handle)

    @contextlib.contextmanager
    def _keeping_first_error(self) -> Iterator[None]:
        """Raise the first error again, or translate and keep an error of the block."""
        if self._failed:
            raise self._failed
        try:
            yield
        except OSError as error:
            self._failed = translated(error, self._path.location)
            raise self._failed from error
        except WorkerError as error:
            self._failed = error
            raise

    def _stat_part(self, directory: int) -> os.stat_result:
        return os.stat(self._part, dir_fd=directory, follow_symlinks=False)

    def _missing_part(self) -> WorkerError:
        """Return the error of a commit without a part: another thread aborted, or another attempt took the part."""
        aborted = _Closed("The write was aborted", self._path.location, "Start the transfer again")
        return aborted if self._ended else Cancelled("fenced")

    def _check_object(self, directory: int) -> None:
        """Check the size of the committed object, unless a later writer has replaced it.

        The check opens the file, because an NFS client then asks the server and not its cache.
        """
        handle = os.open(self._path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            seen = os.fstat(handle)
        finally:
            os.close(handle)
        if _identity(seen) == self._identity:
            self._check_size(seen)

    def _check_size(self, seen: os.stat_result) -> None:
        if seen.st_size != self._size:
            what = f"The store has {seen.st_size} bytes of the {self._size} written"
            raise StoreUnavailable(what, self._path.location, "Retry")

    def _rename(self, directory: int) -> None:
        try:
            os.rename(self._part, self._path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except FileNotFoundError as error:
            raise self._missing_part() from error


def _write_all(handle: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(handle, piece) :]


def _runs(chunk: bytes, position: int) -> Iterator[tuple[memoryview, bool]]:
    """Split a chunk at file offset *position* into runs of blocks. Yield each run, and whether it is all zeros.

    The function first checks the first and last byte of a block, so that data costs almost no time. It compares slices
    of bytes: Python compares a memoryview byte by byte, at a hundredth of the speed.
    """
    view, begin, was_zero = memoryview(chunk), 0, False
    for block in range(-(position % HOLE), len(chunk), HOLE):
        at, end = max(block, 0), min(block + HOLE, len(chunk))
        is_zero = not (chunk[at] or chunk[end - 1]) and chunk[at:end] == _ZEROS[: end - at]
        if is_zero != was_zero and at:
            yield view[begin:at], was_zero
            begin = at
        was_zero = is_zero
    if chunk:
        yield view[begin:], was_zero


def _identity(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_dev, seen.st_ino
