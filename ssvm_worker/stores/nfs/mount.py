"""One export's mount on this host: made when it is first used, shared by all processes, proved before each use.

Below ``mount_root``, for each export:

    SLUG/           the mountpoint
    SLUG.lock       locked while somebody mounts or unmounts
    SLUG.users      a shared lock for each user; its time is that of the last use
    SLUG.mounted    there while the mount is one that we made
    SLUG.id         what the export's marker said when this host saw it first
    SLUG.health     whether it answers: its breaker, and what the last look found
    SLUG.dying-PID  a process that hangs in it wants to be let die
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

from . import command_process
from .circuit_breaker import CLOSED
from .commands import MountCommands, NotSpoken, abort_command, mount_command, unmount_command
from .export_id import prove
from .health import SharedExportHealth
from .mountinfo import Mount, mounts
from .probe import OK, STALE, probe

_AGAIN_S = 0.05
#: Seconds for which a look is good enough. A server that dies within them is met by a call, not by a probe.
_FRESH_S = 5.0
#: Of this process.
_MOUNTED: weakref.WeakSet[Mounted] = weakref.WeakSet()
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True)
class MountPaths:
    """Where an export's files on this host lie."""

    root: Path
    slug: str

    @property
    def point(self) -> Path:
        """The mountpoint."""
        return self.root / self.slug

    def file(self, kind: str) -> Path:
        """``SLUG.<kind>``."""
        return self.root / f"{self.slug}.{kind}"


@dataclass(frozen=True)
class MountTimeouts:
    """Seconds."""

    #: For mounting, and for unmounting.
    mount_s: float = 30.0
    #: For a look at it.
    probe_s: float = 10.0


class Mounted:
    """See the module. Safe to share between threads. What it is asked may touch the server, and hang with it."""

    def __init__(
        self,
        export: Export,
        root: Path,
        commands: MountCommands,
        patience: MountTimeouts,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """*check* is heard while anything here waits; what it raises ends the wait."""
        self.export = export
        self.places = MountPaths(root, export.slug)
        self.health = SharedExportHealth(self.places.file("health"), export.source)
        self._commands = commands
        self._patience = patience
        self._check = check
        self._lock = RLock()
        self._user: int | None = None
        self._made = False
        #: The mount whose marker was read.
        self._proved: Mount | None = None
        #: On the monotonic clock: until when the last look at it is good enough.
        self._fresh_until = 0.0
        _MOUNTED.add(self)

    @property
    def made(self) -> bool:
        """Whether this object mounted it."""
        return self._made

    @property
    def is_used(self) -> bool:
        """Whether this object is one of its users."""
        return self._user is not None

    def open_root(self) -> int:
        """A handle of the export's root, which is the right one: all is done from there, never by a path.

        The bare directory under the mount has another device, and so has whatever else is mounted there. Raises
        StoreAway while the server does not answer: a child has looked, a moment ago at the most.
        """
        with self._alone():
            if self._proved is not None and time.monotonic() < self._fresh_until:
                with contextlib.suppress(_NotThere):
                    return self._open(self._proved)
            return self._open_anew()

    def look(self) -> None:
        """Keep what a look at it finds, if it is mounted; StoreAway if it does not answer, or is not due."""
        if (mount := self.found()) is not None:
            self.health.begin(self._limit_s)
            self._look(mount)

    def commands(self) -> list[list[str]]:
        """All that may be run as root for it."""
        export, point = self.export, str(self.places.point)
        mounting = [mount_command(export.source, point, export.option_text(each)) for each in export.versions]
        return [*mounting, unmount_command(point), unmount_command(point, lazily=True), abort_command(point)]

    def let_die(self, pid: int) -> None:
        """Fail what that process still has under way here, if the mount is ours, so that a SIGKILL can end it.

        Never by the process itself, nor by one with files open here: a fork's first act is to close them, which hangs.
        """
        if self.places.file("mounted").exists():
            self._commands.let_die(str(self.places.point), pid)

    def let_the_dying_die(self) -> None:
        """The processes that have asked for it: see ``ask_to_die``."""
        for mark in self.places.root.glob(f"{self.places.slug}.dying-*"):
            with contextlib.suppress(FileNotFoundError):
                mark.unlink()
                self.let_die(int(mark.name.rpartition("-")[2]))

    def release(self) -> None:
        """This process no longer uses it, until it asks again."""
        with self._lock:
            self._proved = None
            if self._user is not None:
                self._leave()
                self._user = None

    def found(self) -> Mount | None:
        """The mount, ours first; None if there is none."""
        own, foreign = str(self.places.point), None
        for each in reversed(mounts()):
            if each.point == own:
                return each if self._is_it(each) else None
            if self._is_it(each) and self._as_wanted(each):
                foreign = foreign or each
        return foreign

    def unmount_unused(self, idle_s: float = 0.0) -> bool:
        """Unmount what we have mounted and nobody has used for so long; whether we did. Raises StoreUnavailable."""
        if not self.places.file("mounted").exists():
            return False
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(_locked(self.places.file("lock"), fcntl.LOCK_EX, 0))
                stack.enter_context(_locked(self.places.file("users"), fcntl.LOCK_EX, 0))
            except ResourceBusy:
                return False
            if time.time() - self.places.file("users").stat().st_mtime < idle_s:
                return False
            # A server that is away would hold up an unmount that asks it.
            self._unmount(held, lazily=self.health.read().breaker.state != CLOSED)
            return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out; one of them may be waiting for a mount."""
        while not self._lock.acquire(timeout=command_process.GRACE_S):
            self._check()
        try:
            yield
        finally:
            self._lock.release()

    def _open_anew(self) -> int:
        command_process.start()  # while no file is open yet
        self._enter()
        self.health.begin(self._limit_s)
        mount = self._look(self._present())
        try:
            handle = self._open(mount)
        except _NotThere as error:
            what = "Something else lies over the mount"
            raise StoreUnavailable(what, mount.point, "`findmnt` says what; unmount it") from error
        try:
            if mount != self._proved:
                with translating(self.export.source):
                    prove(handle, self.places.file("id"), self.export.source)
        except BaseException as error:
            os.close(handle)
            if isinstance(error, StoreAway):
                self._put_away(mount)
            raise
        self._proved, self._fresh_until = mount, time.monotonic() + _FRESH_S
        return handle

    def _open(self, mount: Mount) -> int:
        try:
            handle = os.open(mount.point, _OPEN)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise _NotThere from error
            raise translated(error, self.export.source) from error
        if os.fstat(handle).st_dev != os.makedev(*mount.device):
            os.close(handle)
            raise _NotThere
        return handle

    @property
    def _limit_s(self) -> float:
        """Seconds that one who tries it may take: two looks, a lazy unmount and a mount between."""
        return 2 * (self._patience.probe_s + self._patience.mount_s)

    def _look(self, mount: Mount) -> Mount:
        """The mount, or the one made in its place if it is stale; StoreAway if it does not answer."""
        probed = probe(mount.point, self._patience.probe_s, check=self._check)
        if probed.state == STALE:
            mount = self._mount_anew(mount)
            probed = probe(mount.point, self._patience.probe_s, check=self._check)
        self.health.note(probed)
        if probed.state != OK:
            self._proved = None
            raise self.health.away()
        return mount

    def _mount_anew(self, stale: Mount) -> Mount:
        """Take a stale mount away, lazily; one that is not ours is its administrator's to mend."""
        with self._answering(), self._exclusively() as held:
            mount = self.found()
            if mount != stale:
                return mount or self._mount(held)  # another process was quicker
            if mount.point != str(self.places.point) or not self.places.file("mounted").exists():
                raise StoreUnavailable("The mount is stale, and not the worker's", mount.point, "Remount it")
            self._unmount(held, lazily=True)
            return self._mount(held)

    def _put_away(self, wrong: Mount) -> None:
        """Unmount what is not our export, if it is our mount: it would stay what it is when the right one is back.

        Seen with an export that was removed from below another: its name is then a bare directory of the server.
        """
        with contextlib.suppress(WorkerError), self._exclusively() as held:
            ours = wrong.point == str(self.places.point) and self.places.file("mounted").exists()
            if ours and self.found() == wrong:
                self._unmount(held, lazily=True)

    def _present(self) -> Mount:
        with self._answering(), self._exclusively() as held:
            return self.found() or self._mount(held)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """What keeps it from being mounted opens the breaker, unless the settings are wrong.

        That the server refuses us is for a person to mend if it always has; else its exports will come back.
        """
        try:
            yield
        except (ConfigError, Cancelled):
            raise
        except WorkerError as error:
            never_worked = not self.places.file("id").exists()
            if never_worked and isinstance(error, StoreDenied | NotSpoken):
                raise
            self.health.fail(error.what)
            raise self.health.away() from error

    def _exclusively(self) -> contextlib.AbstractContextManager[int]:
        return _locked(self.places.file("lock"), fcntl.LOCK_EX, 2 * self._patience.mount_s, self._check)

    def _mount(self, held: int) -> Mount:
        with _writable(self.places.root):
            self.places.point.mkdir(mode=0o500, exist_ok=True)
            self.places.file("mounted").touch(0o600)
        try:
            self._mount_some_version(held)
        except Cancelled:
            raise  # the command goes on, and what it mounts is ours
        except WorkerError:
            if not self.found():
                self.places.file("mounted").unlink(missing_ok=True)
            raise
        self._made = True
        if mount := self.found():
            return mount
        raise StoreUnavailable("It was mounted, and is not there", str(self.places.point), "`findmnt` says what is")

    def _mount_some_version(self, held: int) -> None:
        first: NotSpoken | None = None
        for version in self.export.versions:
            try:
                options = self.export.option_text(version)
                self._commands.mount(self.export.source, str(self.places.point), options, held)
                return
            except NotSpoken as error:
                first = first or error
        assert first is not None
        raise first

    def _unmount(self, held: int, *, lazily: bool = False) -> None:
        """Each layer of it: a mount.nfs that outlived its worker may have put one more on top."""
        own = str(self.places.point)
        for _ in [each for each in mounts() if each.point == own and self._is_it(each)]:
            self._commands.unmount(own, held, lazily=lazily)
        self.places.file("mounted").unlink(missing_ok=True)

    def _is_it(self, mount: Mount) -> bool:
        return mount.fstype in self._commands.fstypes and mount.source == self.export.source

    def _as_wanted(self, mount: Mount) -> bool:
        """Whether somebody else's mount is by the version and port that were asked for."""
        versions = self.export.versions
        spoken = mount.options.get("vers", versions[0])
        port = int(mount.options.get("port") or NFS_PORT)
        return port == self.export.port and (spoken in versions or spoken.partition(".")[0] in versions)

    def _enter(self) -> None:
        """Be one of its users, for as long as this object lives or until it is released."""
        if self._user is None:
            with _writable(self.places.root):
                self.places.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            patience_s = 2 * self._patience.mount_s
            self._user = _lock(self.places.file("users"), fcntl.LOCK_SH, patience_s, self._check)
            self._leave = weakref.finalize(self, _leave, self._user)
        os.utime(self._user)


def used_and_away() -> StoreAway | None:
    """Why an export that this process uses does not answer, as the host knows; None if all do. Touches no mount."""
    for each in list(_MOUNTED):
        if each.is_used and each.health.read().breaker.state != CLOSED:
            return each.health.away()
    return None


def ask_to_die() -> None:
    """Before this process kills itself: what it hangs in may be a call that not even SIGKILL ends."""
    for each in list(_MOUNTED):
        if each.is_used and each.health.read().breaker.state != CLOSED:
            with contextlib.suppress(OSError):
                each.places.file(f"dying-{os.getpid()}").touch(0o600)


@atexit.register
def unmount_ours() -> None:
    """What a command on its own has mounted goes with it, unless others use it. Pool processes do not come by here."""
    for each in (everything := list(_MOUNTED)):
        each.release()
    for each in everything:
        with contextlib.suppress(WorkerError, OSError):
            _ = each.made and each.unmount_unused()


class _NotThere(Exception):
    """What was proved is no longer there."""


def _leave(user: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(user)
    os.close(user)


@contextlib.contextmanager
def _locked(path: Path, how: int, patience_s: float, check: Callable[[], None] = lambda: None) -> Iterator[int]:
    handle = _lock(path, how, patience_s, check)
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(path: Path, how: int, patience_s: float, check: Callable[[], None]) -> int:
    """A handle that holds the lock; ResourceBusy if it is somebody else's for longer than *patience_s*.

    *check* is called while it waits, and may raise.
    """
    with _writable(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _wait_for(handle, how, patience_s, check, str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _wait_for(handle: int, how: int, patience_s: float, check: Callable[[], None], where: str) -> None:
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            return
        except OSError as error:
            if time.monotonic() >= began + patience_s:
                raise ResourceBusy("Another process mounts or unmounts it", where, "Try again") from error
        if time.monotonic() >= began + command_process.GRACE_S:
            check()
        time.sleep(_AGAIN_S)


@contextlib.contextmanager
def _writable(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"The worker cannot keep its mounts there: {error.strerror}", str(place), "Set nfs.mount_root"
        ) from error
