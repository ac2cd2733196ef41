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
from threading import Lock
from typing import NoReturn

from ssvm_worker.errors import Cancelled, StoreUnavailable, WorkerError
from ssvm_worker.stream import CHUNK, Owner, StoredObject
from ssvm_worker.units import KiB

from .directory import Tree, translated, translating
from .sink import LeavingAborts

_FILE_MODE = 0o640
_PART = re.compile(r"\.(?P<name>.+)\.(?P<job>[A-Za-z0-9_-]+)\.(?P<token>\d+)\.part")
#: Characters of a job id in a part's name: with a key's 180 and a token's 20 that stays below NAME_MAX, 255.
_JOB_LENGTH = 40
#: Zeros in a row that are worth a hole. A shorter one would cost more in extents than it saves in blocks.
HOLE = 64 * KiB
_ZEROS = bytes(HOLE)
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


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
class Place:
    """Where an object will lie."""

    tree: Tree
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


def begin(place: Place, owner: Owner, resume: bool) -> FileSink:
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
        return FileSink(place, str(part), os.dup(directory), handle)


def _left_by_job(directory: int, part: PartName) -> list[PartName]:
    """The parts of this object that the same job has left, the newest last."""
    parts = (PartName.parse(name) for name in os.listdir(directory))
    left = [each for each in parts if each and (each.name, each.job) == (part.name, part.job)]
    if any(each.token > part.token for each in left):
        raise Cancelled("fenced")
    return sorted(left, key=lambda each: each.token)


class FileSink(LeavingAborts):
    """See Sink; holds two handles and no bytes. The first error is final: it is raised again by all that follows."""

    def __init__(self, place: Place, part: str, directory: int, handle: int) -> None:
        self.key = place.key
        self.offset = os.lseek(handle, 0, os.SEEK_END)
        self._place = place
        self._part = part
        self._directory = directory
        self._handle = handle
        self._identity = _identity(os.fstat(handle))
        self._size = self.offset
        #: Zeros at the end of what was given that are not in the file yet.
        self._zeros = 0
        #: Bytes at the front that are on the disk for good.
        self._settled = 0
        #: Held while the handle is closed, or used by another thread than the one that writes.
        self._settling = Lock()
        self._failed: WorkerError | None = None
        self._ended = False

    def cut(self, size: int) -> None:
        """Go on behind the first *size* bytes of what was left, if that is more; before the first write."""
        if self.offset > size:
            with translating(self._place.where):
                os.ftruncate(self._handle, size)
                self.offset = self._size = os.lseek(self._handle, 0, os.SEEK_END)

    def write(self, chunk: bytes) -> None:
        """See Sink."""
        with self._once_failed_for_ever():
            for piece, is_zero in _runs(chunk, self._size):
                if is_zero:
                    self._zeros += len(piece)
                else:
                    self._place_zeros()
                    self._write_all(piece)
            self._size += len(chunk)

    def resumed(self) -> Iterator[bytes]:
        """See Sink."""
        done = 0
        while done < self.offset:
            with translating(self._place.where):
                chunk = os.pread(self._handle, min(CHUNK, self.offset - done), done)
            if not chunk:
                raise StoreUnavailable("The bytes of the earlier attempt are gone", self._place.where, "Try again")
            done += len(chunk)
            yield chunk

    def settle(self) -> int:
        """See Sink. What goes wrong here is told to nobody else, not to the last fsync either: it is final."""
        with self._settling:
            if self._handle >= 0:
                with self._once_failed_for_ever():
                    size = os.fstat(self._handle).st_size
                    os.fdatasync(self._handle)
                    self._settled = size
            return self._settled

    def commit(self) -> StoredObject:
        """See Sink. Cancelled if a newer writer of the same job took the part."""
        with self._once_failed_for_ever():
            self._end_in_zeros()
            os.fsync(self._handle)
            self._close()
            modified = self._check_part()
            self._rename()
            os.fsync(self._directory)
            self._check_object()
        self._end()
        return StoredObject(self.key, self._size, when=modified)

    def abort(self) -> None:
        """See Sink. What cannot be removed is left to the sweep: an abort must not hide the error before it."""
        if self._ended:
            return
        with contextlib.suppress(OSError):
            self._close()
        self._settled = 0
        with contextlib.suppress(OSError):
            if _identity(self._look()) == self._identity:
                os.unlink(self._part, dir_fd=self._directory)
        self._end()
        self._place.tree.prune(self._place.directory)

    def suspend(self) -> None:
        """See Sink. Bytes behind a failed write cannot be trusted and are not kept."""
        if self._ended:
            return
        if self._failed or not self._size:
            self.abort()
            return
        with contextlib.suppress(OSError):
            self._end_in_zeros()
            os.fsync(self._handle)
            self._settled = self._size
            self._close()
        self._end()

    def _write_all(self, piece: memoryview) -> None:
        while piece:
            piece = piece[os.write(self._handle, piece) :]

    def _place_zeros(self) -> None:
        """What follows is data: leave a hole before it, or write the few zeros."""
        if self._zeros >= HOLE:
            os.lseek(self._handle, self._zeros, os.SEEK_CUR)
        elif self._zeros:
            self._write_all(memoryview(_ZEROS)[: self._zeros])
        self._zeros = 0

    def _end_in_zeros(self) -> None:
        if self._zeros:
            os.ftruncate(self._handle, self._size)
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

    def _look(self) -> os.stat_result:
        return os.stat(self._part, dir_fd=self._directory, follow_symlinks=False)

    def _check_part(self) -> float:
        """Its time, if it is still ours and as long as what was written."""
        try:
            seen = self._look()
        except FileNotFoundError as error:
            _fenced(error)
        if _identity(seen) != self._identity:
            _fenced(None)
        self._check_size(seen)
        return seen.st_mtime

    def _check_object(self) -> None:
        """Opened anew, as NFS asks the server then, and not the cache; one that a later writer put there is its own."""
        handle = os.open(self._place.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
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

    def _rename(self) -> None:
        try:
            os.rename(self._part, self._place.name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except FileNotFoundError as error:
            _fenced(error)

    def _close(self) -> None:
        with self._settling:
            handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _end(self) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            self._close()
        os.close(self._directory)


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


def _fenced(error: OSError | None) -> NoReturn:
    raise Cancelled("fenced") from error
