"""The mount of one export on this host. The first use mounts it, all processes share it, and each use checks it.

``mount_root`` has these entries for each export:

    SLUG/           the mountpoint
    SLUG.lock       locked during a mount or an unmount
    SLUG.users      each user holds a shared lock; the file's time is the time of the last use
    SLUG.mounted    exists while the worker's own mount exists
    SLUG.id         the id of the export's marker when this host saw it first
    SLUG.health     the health of the export: its breaker and the last probe
    SLUG.dying-PID  exists when a process that hangs in the mount is about to kill itself
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from ssvm_worker.config.schema import NfsSection
from ssvm_worker.errors import (
    Cancelled,
    ConfigError,
    ResourceBusy,
    StoreAway,
    StoreDenied,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.net.nfs_url import NFS_PORT, Export
from ssvm_worker.stores.file.tree import translated, translating
from ssvm_worker.stores.ownership import give_to_owner

from . import command_process
from .circuit_breaker import CLOSED
from .commands import MountCommands, NotSpoken, abort_command, mount_command, unmount_command
from .export_id import prove
from .health import SharedExportHealth
from .mountinfo import Mount, mounts
from .probe import OK, STALE, probe

#: The [nfs] section without any setting.
DEFAULTS = NfsSection()
_POLL_S = 0.05
#: Seconds for which a probe is valid. If the server fails in this time, a call notices the failure.
_PROBE_VALID_S = 5.0
#: The mounts of this process.
_MOUNTED: weakref.WeakSet[Mounted] = weakref.WeakSet()
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True)
class MountPaths:
    """The paths of an export's files on this host."""

    root: Path
    slug: str

    @property
    def point(self) -> Path:
        """The mountpoint."""
        return self.root / self.slug

    def file(self, kind: str) -> Path:
        """Return the path ``SLUG.<kind>``."""
        return self.root / f"{self.slug}.{kind}"


@dataclass(frozen=True)
class MountTimeouts:
    """Time limits in seconds."""

    #: For a mount, and for an unmount.
    mount_s: float = DEFAULTS.mount_s
    #: For a probe.
    probe_s: float = DEFAULTS.probe_s


class Mounted:
    """One export's mount. Thread-safe. Each method may access the server, and hang if the server does not answer."""

    def __init__(
        self,
        export: Export,
        root: Path,
        commands: MountCommands,
        timeouts: MountTimeouts,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Methods call *check* while they wait. An error of *check* ends the wait."""
        self.export = export
        #: Whether this object has mounted the export.
        self.made = False
        self.paths = MountPaths(root, export.slug)
        self.health = SharedExportHealth(self.paths.file("health"), export.source)
        self._commands = commands
        self._timeouts = timeouts
        self._check = check
        self._lock = RLock()
        #: The handle with the shared lock of this user.
        self._user: int | None = None
        #: The mount whose marker was checked.
        self._proved: Mount | None = None
        #: The end of the last probe's validity on the monotonic clock.
        self._valid_until = 0.0
        _MOUNTED.add(self)

    @property
    def is_used(self) -> bool:
        """Whether this object is a user of the mount."""
        return self._user is not None

    def open_root(self) -> int:
        """Return a handle of the export's root after a check. Callers open all files relative to it, never by a path.

        The check compares the device: the directory below the mount, and any other mount, have another device.
        Raises StoreAway if the server does not answer. A child process probes it, unless the last probe is still valid.
        """
        with self._exclusive_thread():
            if self._proved is not None and time.monotonic() < self._valid_until:
                with contextlib.suppress(_NotMounted):
                    return self._open(self._proved)
            return self._open_checked()

    def refresh_health(self) -> None:
        """Probe the export if it is mounted, and save the result.

        Raises StoreAway if the export does not answer, or the next try is not due.
        """
        if (mount := self.find()) is not None:
            self.health.begin(self._limit_s)
            self._probe(mount)

    def commands(self) -> list[list[str]]:
        """Return all commands that the worker may run as root for this export."""
        export, point = self.export, str(self.paths.point)
        mounting = [mount_command(export.source, point, export.option_text(each)) for each in export.versions]
        return [*mounting, unmount_command(point), unmount_command(point, lazily=True), abort_command(point)]

    def abort_requests(self, pid: int) -> None:
        """Abort the NFS requests of a process to the worker's mount, so that SIGKILL can end the process.

        Neither this process nor a process with open files on the mount may call it: their fork closes the files and
        hangs.
        """
        if self.paths.file("mounted").exists():
            self._commands.abort_requests(str(self.paths.point), pid)

    def abort_marked_processes(self) -> None:
        """Abort the NFS requests of the processes that called ``mark_for_abort``."""
        for mark in self.paths.root.glob(f"{self.paths.slug}.dying-*"):
            with contextlib.suppress(FileNotFoundError):
                mark.unlink()
                self.abort_requests(int(mark.name.rpartition("-")[2]))

    def release(self) -> None:
        """Stop using the mount until the next call of ``open_root``."""
        with self._lock:
            self._proved = None
            if self._user is not None:
                self._leave()
                self._user = None

    def find(self) -> Mount | None:
        """Return the worker's mount, else another mount of the export, else None."""
        own, foreign = str(self.paths.point), None
        for each in reversed(mounts()):
            if each.point == own:
                return each if self._is_export(each) else None
            if self._is_export(each) and self._has_options(each):
                foreign = foreign or each
        return foreign

    def unmount_unused(self, idle_s: float = 0.0) -> bool:
        """Unmount the worker's mount if no process has used it for *idle_s* seconds. Return whether it was unmounted.

        Raises StoreUnavailable.
        """
        if not self.paths.file("mounted").exists():
            return False
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(_locked(self.paths.file("lock"), fcntl.LOCK_EX, 0))
                stack.enter_context(_locked(self.paths.file("users"), fcntl.LOCK_EX, 0))
            except ResourceBusy:
                return False
            if time.time() - self.paths.file("users").stat().st_mtime < idle_s:
                return False
            # A normal unmount asks the server, and would hang if the server does not answer.
            self._unmount(held, lazily=self.health.read().breaker.state != CLOSED)
            return True

    @contextlib.contextmanager
    def _exclusive_thread(self) -> Iterator[None]:
        """Exclude other threads while the block runs. Another thread may hold the lock while it waits for a mount."""
        while not self._lock.acquire(timeout=command_process.GRACE_S):
            self._check()
        try:
            yield
        finally:
            self._lock.release()

    def _open_checked(self) -> int:
        """Mount the export if necessary, probe it, check its marker, and open its root."""
        command_process.start()  # before this process opens a file of the export
        self._enter()
        self.health.begin(self._limit_s)
        with self._opening_breaker(), self._exclusively() as held:
            mount = self.find() or self._mount(held)
        mount = self._probe(mount)
        try:
            handle = self._open(mount)
        except _NotMounted as error:
            remedy = "Find the other mount with `findmnt`, and unmount it"
            raise StoreUnavailable("Another mount covers the export", mount.point, remedy) from error
        try:
            if mount != self._proved:
                with translating(self.export.source):
                    prove(handle, self.paths.file("id"), self.export.source)
        except BaseException as error:
            os.close(handle)
            if isinstance(error, StoreAway):
                self._unmount_wrong(mount)
            raise
        self._proved, self._valid_until = mount, time.monotonic() + _PROBE_VALID_S
        return handle

    def _open(self, mount: Mount) -> int:
        """Open the root of a mount. Raise _NotMounted if its mountpoint has another device."""
        try:
            handle = os.open(mount.point, _OPEN)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise _NotMounted from error
            raise translated(error, self.export.source) from error
        if os.fstat(handle).st_dev != os.makedev(*mount.device):
            os.close(handle)
            raise _NotMounted
        return handle

    @property
    def _limit_s(self) -> float:
        """Time limit in seconds of a try: two probes, with a lazy unmount and a mount between them."""
        return 2 * (self._timeouts.probe_s + self._timeouts.mount_s)

    def _probe(self, mount: Mount) -> Mount:
        """Probe a mount, and replace a stale one. Return the mount. Raise StoreAway if it does not answer."""
        probed = probe(mount.point, self._timeouts.probe_s, check=self._check)
        if probed.state == STALE:
            mount = self._replace(mount)
            probed = probe(mount.point, self._timeouts.probe_s, check=self._check)
        self.health.note(probed)
        if probed.state != OK:
            self._proved = None
            raise self.health.away()
        return mount

    def _replace(self, stale: Mount) -> Mount:
        """Unmount a stale mount lazily, and mount the export again. Only an administrator may replace other mounts."""
        with self._opening_breaker(), self._exclusively() as held:
            mount = self.find()
            if mount != stale:
                return mount or self._mount(held)  # another process has replaced the mount
            if not self._is_own(mount):
                raise StoreUnavailable("The mount is stale, and not the worker's", mount.point, "Remount it")
            self._unmount(held, lazily=True)
            return self._mount(held)

    def _unmount_wrong(self, wrong: Mount) -> None:
        """Unmount the worker's mount of a wrong export. It would stay wrong after the right export is back.

        Example: an export below another export is removed. Its path is then a bare directory of the server.
        """
        with contextlib.suppress(WorkerError), self._exclusively() as held:
            if self._is_own(wrong) and self.find() == wrong:
                self._unmount(held, lazily=True)

    def _is_own(self, mount: Mount) -> bool:
        """Return whether the worker made this mount."""
        return mount.point == str(self.paths.point) and self.paths.file("mounted").exists()

    @contextlib.contextmanager
    def _opening_breaker(self) -> Iterator[None]:
        """Open the breaker if a mount fails while the block runs, except for wrong settings and cancels.

        If the server has always refused the mount, an administrator must act, and the error is raised unchanged. If
        the export has worked before, the worker waits until it works again.
        """
        try:
            yield
        except (ConfigError, Cancelled):
            raise
        except WorkerError as error:
            never_worked = not self.paths.file("id").exists()
            if never_worked and isinstance(error, StoreDenied):
                raise
            self.health.fail(error.what)
            raise self.health.away() from error

    def _exclusively(self) -> contextlib.AbstractContextManager[int]:
        """Exclude other processes from mounting and unmounting while the block runs."""
        return _locked(self.paths.file("lock"), fcntl.LOCK_EX, 2 * self._timeouts.mount_s, self._check)

    def _mount(self, held: int) -> Mount:
        with _writable(self.paths.root):
            self.paths.point.mkdir(mode=0o500, exist_ok=True)
            self.paths.file("mounted").touch(0o600)
            for each in (self.paths.point, self.paths.file("mounted")):
                give_to_owner(each)
        try:
            self._mount_some_version(held)
        except Cancelled:
            raise  # the command continues, and its mount is the worker's
        except WorkerError:
            if not self.find():
                self.paths.file("mounted").unlink(missing_ok=True)
            raise
        self.made = True
        if mount := self.find():
            return mount
        what = "The mount command succeeded, but the export is not mounted"
        raise StoreUnavailable(what, str(self.paths.point), "`findmnt` lists the mounts")

    def _mount_some_version(self, held: int) -> None:
        first: NotSpoken | None = None
        for version in self.export.versions:
            try:
                options = self.export.option_text(version)
                self._commands.mount(self.export.source, str(self.paths.point), options, held)
                return
            except NotSpoken as error:
                first = first or error
        assert first is not None
        # mount.nfs has one exit status for all errors, so the worker reads its text. The commands run with LC_ALL=C.
        # mount(2) has one cause for ENODEV: the kernel does not know the type, also after a search for a module. If
        # only one version of NFS is missing, the error is EPROTONOSUPPORT.
        if os.strerror(errno.ENODEV) in first.what:
            what = "This host cannot mount NFS: its kernel has no NFS client"
            raise ConfigError(
                what, self.export.source, "modprobe nfs, or install the modules of this kernel"
            ) from first
        raise StoreDenied(first.what, first.where, first.remedy) from first

    def _unmount(self, held: int, *, lazily: bool = False) -> None:
        """Unmount all layers: a mount.nfs that survives its worker may add a second mount on top."""
        own = str(self.paths.point)
        for _ in [each for each in mounts() if each.point == own and self._is_export(each)]:
            self._commands.unmount(own, held, lazily=lazily)
        self.paths.file("mounted").unlink(missing_ok=True)

    def _is_export(self, mount: Mount) -> bool:
        return mount.fstype in self._commands.fstypes and mount.source == self.export.source

    def _has_options(self, mount: Mount) -> bool:
        """Return whether an administrator's mount has the version and port of the settings."""
        versions = self.export.versions
        version = mount.options.get("vers", versions[0])
        port = int(mount.options.get("port") or NFS_PORT)
        return port == self.export.port and (version in versions or version.partition(".")[0] in versions)

    def _enter(self) -> None:
        """Become a user of the mount until this object is released or deleted."""
        if self._user is None:
            with _writable(self.paths.root):
                self.paths.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                give_to_owner(self.paths.root)
            limit_s = 2 * self._timeouts.mount_s
            self._user = _lock(self.paths.file("users"), fcntl.LOCK_SH, limit_s, self._check)
            self._leave = weakref.finalize(self, _leave, self._user)
        os.utime(self._user)


def unavailable_export() -> StoreAway | None:
    """Return the error of an export that this process uses and that does not answer. None: all exports answer.

    The function reads the health that this host has saved. It does not touch a mount.
    """
    for each in list(_MOUNTED):
        if each.is_used and each.health.read().breaker.state != CLOSED:
            return each.health.away()
    return None


def mark_for_abort() -> None:
    """Mark this process before it kills itself. It may hang in a call that SIGKILL cannot end."""
    for each in list(_MOUNTED):
        if each.is_used and each.health.read().breaker.state != CLOSED:
            with contextlib.suppress(OSError):
                each.paths.file(f"dying-{os.getpid()}").touch(0o600)


@atexit.register
def unmount_at_exit() -> None:
    """Unmount the mounts of this process unless other processes use them. Processes of the pool do not call this."""
    for each in (known := list(_MOUNTED)):
        each.release()
    for each in known:
        with contextlib.suppress(WorkerError, OSError):
            _ = each.made and each.unmount_unused()


class _NotMounted(Exception):
    """The checked mount no longer exists."""


def _leave(user: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(user)
    os.close(user)


@contextlib.contextmanager
def _locked(path: Path, mode: int, limit_s: float, check: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Lock a file while the block runs."""
    handle = _lock(path, mode, limit_s, check)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(path: Path, mode: int, limit_s: float, check: Callable[[], None]) -> int:
    """Lock a file, and return the handle. Raise ResourceBusy if another process holds the lock for *limit_s*.

    The function calls *check* while it waits.
    """
    with _writable(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        give_to_owner(path, handle)
        _wait_for(handle, mode, limit_s, check, str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _wait_for(handle: int, mode: int, limit_s: float, check: Callable[[], None], location: str) -> None:
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
            return
        except OSError as error:
            if time.monotonic() >= began + limit_s:
                raise ResourceBusy("Another process mounts or unmounts the export", location, "Retry") from error
        if time.monotonic() >= began + command_process.GRACE_S:
            check()
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Translate OSError while the block runs."""
    try:
        yield
    except OSError as error:
        what = f"The worker cannot write to its mount directory: {error.strerror}"
        raise ConfigError(
            what, str(path), "Give it to the worker's user (chown), or set nfs.mount_root to a writable directory"
        ) from error
