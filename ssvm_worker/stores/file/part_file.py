"""Uncommitted bytes in a directory: a hidden file beside the final name, ``.<name>.<job>.<token>.part``.

The fence lies in that name. A newer writer of the same job renames or removes the part, so whoever lost its claim finds
nothing to rename at its commit. Unless it resumes, the newer one writes a fresh inode, which no old handle reaches.

Zeros of 64 KiB and more in a row are not written: they become holes, which read as zeros and take no room.
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

_FILE_MODE = 0o640
_PART = re.compile(r"\.(?P<name>.+)\.(?P<job>[A-Za-z0-9_-]+)\.(?P<token>\d+)\.part")
#: Characters of a job id in a part's name: with a key's 180 and a token's 20 that stays below NAME_MAX, 255.
_JOB_LENGTH = 40
#: Zeros in a row that are worth a hole. A shorter one would cost more in extents than it saves in blocks.
HOLE = 64 * KiB
_ZEROS = bytes(HOLE)
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
#: Seconds that an abort waits for the close of the file, which on NFS first sends what is not yet on the server.
_PROMPTLY_S = 1.0


@dataclass(frozen=True)
class PartName:
    """Whose uncommitted bytes of which object."""

    name: str
    job: str
    token: int

    def __str__(self) -> str:
        return f".{self.name}.{self.job}.{self.token}.part"

    @classmethod
    def parse(cls, text: str) -> PartName | None:
        """The part of that file name, or None for any other file."""
        match = _PART.fullmatch(text)
        return cls(match["name"], match["job"], int(match["token"])) if match else None


def job_in_name(job_id: str) -> str:
    """The job id as a part's name holds it: itself if plain and short, else shortened, with a hash to tell it apart."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", job_id)
    if plain == job_id and 0 < len(plain) <= _JOB_LENGTH:
        return plain
    return f"{plain[: _JOB_LENGTH - 9]}-{hashlib.sha256(job_id.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class ObjectPath:
    """Where an object will lie."""

    tree: DirectoryTree
    key: str
    #: For messages.
    where: str

    @property
    def directory(self) -> tuple[str, ...]:
        """The names above the object's own."""
        return tuple(self.key.split("/")[:-1])

    @property
    def name(self) -> str:
        """The object's own name."""
        return self.key.rsplit("/", 1)[-1]


def begin(place: ObjectPath, owner: Owner, resume: bool) -> FileSink:
    """A sink whose part exists; OSError, or Cancelled when a newer writer of the same job has one."""
    part = PartName(place.name, job_in_name(owner.job_id), owner.token)
    with place.tree.open(place.directory, make=True) as directory:
        left = _left_by_job(directory, part)
        newest = left.pop() if left and resume else None
        for old in left:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(str(old), dir_fd=directory)
        if newest:
            os.rename(str(newest), str(part), src_dir_fd=directory, dst_dir_fd=directory)
        flags = _OPEN if newest else _OPEN | os.O_CREAT | os.O_EXCL
        handle = os.open(str(part), flags, _FILE_MODE, dir_fd=directory)
        try:
            return FileSink(place, str(part), directory, handle)
        except BaseException:
            os.close(handle)
            if not newest:
                with contextlib.suppress(OSError):
                    os.unlink(str(part), dir_fd=directory)
                place.tree.prune(place.directory)
            raise


def _left_by_job(directory: int, part: PartName) -> list[PartName]:
    """The parts of this object that the same job has left, the newest last."""
    parts = (PartName.parse(name) for name in os.listdir(directory))
    left = [each for each in parts if each and (each.name, each.job) == (part.name, part.job)]
    if any(each.token > part.token for each in left):
        raise Cancelled("fenced")
    return sorted(left, key=lambda each: each.token)


class _Closed(StoreUnavailable):
    """The sink was aborted or has ended."""


class _Handle:
    """A descriptor that several threads use. It is closed once, and not while a thread is in a call with it.

    To close it earlier would let the call of a thread reach another file, opened meanwhile under the same number.
    """

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor = descriptor
        self._where = where
        self._lock = Lock()
        self._users = 0
        self._closing = False

    @contextlib.contextmanager
    def use(self) -> Iterator[int]:
        """Keep the descriptor open within; _Closed if it is closed already."""
        with self._lock:
            if self._closing:
                raise _Closed("The write was aborted", self._where, "Start the transfer again")
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
        """Close the descriptor now, or when the last thread leaves it; OSError. Safe to repeat."""
        with self._lock:
            is_mine = not self._closing and not self._users
            self._closing = True
        if is_mine:
            os.close(self._descriptor)


class FileSink(LeavingAborts):
    """See Sink; holds two handles and no bytes. The first error is final: it is raised again by all that follows.

    Any thread may call ``abort``, ``suspend`` and ``sync`` at any time; none of them waits for a call of another.
    """

    def __init__(self, place: ObjectPath, part: str, directory: int, handle: int) -> None:
        """Own *handle* from now on, and a copy of *directory*; the caller closes both after an OSError."""
        self.key = place.key
        self.offset = os.lseek(handle, 0, os.SEEK_END)
        self._place = place
        self._part = part
        self._identity = _identity(os.fstat(handle))
        self._size = self.offset
        #: Zeros at the end of what was given that are not in the file yet.
        self._zeros = 0
        #: Bytes at the front that are on the disk for good.
        self._settled = 0
        self._failed: WorkerError | None = None
        #: Guards the two fields that ``abort``, ``suspend`` and ``sync`` change.
        self._lock = Lock()
        self._ended = False
        self._directory = _Handle(os.dup(directory), place.where)
        self._file = _Handle(handle, place.where)

    def cut(self, size: int) -> None:
        """Go on behind the first *size* bytes of what was left, if that is more; before the first write."""
        if self.offset > size:
            with translating(self._place.where), self._file.use() as handle:
                os.ftruncate(handle, size)
                self.offset = self._size = os.lseek(handle, 0, os.SEEK_END)

    def write(self, chunk: bytes) -> None:
        """See Sink."""
        with self._once_failed_for_ever(), self._file.use() as handle:
            for piece, is_zero in _runs(chunk, self._size):
                if is_zero:
                    self._zeros += len(piece)
                else:
                    self._place_zeros(handle)
                    _write_all(handle, piece)
            self._size += len(chunk)

    def resumed(self) -> Iterator[bytes]:
        """See Sink."""
        done = 0
        while done < self.offset:
            with translating(self._place.where), self._file.use() as handle:
                chunk = os.pread(handle, min(CHUNK, self.offset - done), done)
            if not chunk:
                raise StoreUnavailable("The bytes of the earlier attempt are gone", self._place.where, "Try again")
            done += len(chunk)
            yield chunk

    def sync(self) -> int:
        """See Sink. An error here is final: the kernel reports it once, and the last fsync would not see it."""
        try:
            with self._file.use() as handle, self._once_failed_for_ever():
                size = os.fstat(handle).st_size
                os.fdatasync(handle)
        except _Closed:
            return self._settled
        with self._lock:
            if not self._ended:
                self._settled = max(self._settled, size)
            return self._settled

    def commit(self) -> StoredObject:
        """See Sink. Cancelled if a newer writer of the same job took the part."""
        with self._once_failed_for_ever(), self._directory.use() as directory:
            with self._file.use() as handle:
                self._end_in_zeros(handle)
                os.fsync(handle)
            self._file.close()
            modified = self._check_part(directory)
            self._rename(directory)
            os.fsync(directory)
            self._check_object(directory)
        self._end()
        self._close(self._directory)
        return StoredObject(self.key, self._size, modified=modified)

    def abort(self) -> None:
        """See Sink. What cannot be removed is left to the sweep: an abort must not hide the error before it."""
        if not self._end():
            return
        self._close_promptly()
        with contextlib.suppress(OSError, _Closed), self._directory.use() as directory:
            if _identity(self._look(directory)) == self._identity:
                os.unlink(self._part, dir_fd=directory)
        self._close(self._directory)
        self._place.tree.prune(self._place.directory)

    def suspend(self) -> None:
        """See Sink. Bytes behind a failed write cannot be trusted and are not kept."""
        if self._failed or not self._size:
            self.abort()
            return
        if not self._end(keep=True):
            return
        with contextlib.suppress(OSError):
            with self._file.use() as handle:
                self._end_in_zeros(handle)
                os.fsync(handle)
            self._settled = self._size
        self._close(self._file)
        self._close(self._directory)

    def _end(self, *, keep: bool = False) -> bool:
        """Whether this call ended it, and no earlier one; unless it shall *keep* the bytes, none is settled then."""
        with self._lock:
            was_ended, self._ended = self._ended, True
            if not was_ended and not keep:
                self._settled = 0
            return not was_ended

    def _close(self, handle: _Handle) -> None:
        with contextlib.suppress(OSError):
            handle.close()

    def _close_promptly(self) -> None:
        try:
            closing = Thread(target=self._close, args=(self._file,), name="close", daemon=True)
            closing.start()
        except RuntimeError:  # there can be no more threads
            self._close(self._file)
            return
        closing.join(_PROMPTLY_S)

    def _place_zeros(self, handle: int) -> None:
        """What follows is data: leave a hole before it, or write the few zeros."""
        if self._zeros >= HOLE:
            os.lseek(handle, self._zeros, os.SEEK_CUR)
        elif self._zeros:
            _write_all(handle, memoryview(_ZEROS)[: self._zeros])
        self._zeros = 0

    def _end_in_zeros(self, handle: int) -> None:
        if self._zeros:
            os.ftruncate(handle, self._size)
            self._zeros = 0

    @contextlib.contextmanager
    def _once_failed_for_ever(self) -> Iterator[None]:
        if self._failed:
            raise self._failed
        try:
            yield
        except OSError as error:
            self._failed = translated(error, self._place.where)
            raise self._failed from error
        except WorkerError as error:
            self._failed = error
            raise

    def _look(self, directory: int) -> os.stat_result:
        return os.stat(self._part, dir_fd=directory, follow_symlinks=False)

    def _check_part(self, directory: int) -> float:
        """Its time, if it is still ours and as long as what was written."""
        try:
            seen = self._look(directory)
        except FileNotFoundError as error:
            raise self._gone() from error
        if _identity(seen) != self._identity:
            raise self._gone()
        self._check_size(seen)
        return seen.st_mtime

    def _gone(self) -> WorkerError:
        """The error of a commit that finds no part: another thread has aborted it, or another attempt has taken it."""
        aborted = _Closed("The write was aborted", self._place.where, "Start the transfer again")
        return aborted if self._ended else Cancelled("fenced")

    def _check_object(self, directory: int) -> None:
        """Opened anew, as NFS asks the server then, and not the cache; one that a later writer put there is its own."""
        handle = os.open(self._place.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            seen = os.fstat(handle)
        finally:
            os.close(handle)
        if _identity(seen) == self._identity:
            self._check_size(seen)

    def _check_size(self, seen: os.stat_result) -> None:
        if seen.st_size != self._size:
            raise StoreUnavailable(
                f"The store has {seen.st_size} bytes of the {self._size} written", self._place.where, "Try again"
            )

    def _rename(self, directory: int) -> None:
        try:
            os.rename(self._part, self._place.name, src_dir_fd=directory, dst_dir_fd=directory)
        except FileNotFoundError as error:
            raise self._gone() from error


def _write_all(handle: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(handle, piece) :]


def _runs(chunk: bytes, position: int) -> Iterator[tuple[memoryview, bool]]:
    """The chunk, which goes to *position*, in runs of blocks that are all zero, or not; together they are the chunk.

    A block's ends are looked at first, so that data costs nearly nothing. Slices of bytes are compared, as a
    memoryview is compared byte by byte, at a hundredth of the speed.
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
