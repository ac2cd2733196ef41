"""Exports without a server. A tmpfs is mounted under an export's name, so mountinfo shows an export."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.stores.nfs.commands import NotSpoken
from ssvm_worker.stores.nfs.mountinfo import mounts
from tests.neighbours import missing

#: Only of this process. The same table also has the mounts of other test processes.
ADDRESS = f"10.{os.getpid() >> 16 & 255}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"

_LIBC = ctypes.CDLL(None, use_errno=True)
_BIND, _DETACH = 4096, 2  # of sys/mount.h


@dataclass
class MemoryExports:
    """Each mount of a source shows the same directory below *root*, as with a real export."""

    root: Path
    fstypes: frozenset[str] = frozenset({"tmpfs", "fuse"})
    #: The NFS versions that the server supports.
    speaks: tuple[str, ...] = ("4.2", "4.1", "3")
    #: Whether another file system is mounted over the export.
    covers: bool = False
    #: The sources with their options, in the order of the mounts.
    mounted: list[tuple[str, str]] = field(default_factory=list)

    _dead: list[int] = field(default_factory=list)

    def die(self, source: str, point: str) -> None:
        """Let the server disappear. Its mounts give no answer, like FUSE without its server."""
        server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        _mount(source, point, "fuse", data=f"fd={server},rootmode=40000,user_id=0,group_id=0")
        self._dead.append(server)

    def forget(self) -> None:
        """Let the server return without its old handles. Each call fails at once."""
        while self._dead:
            os.close(self._dead.pop())

    def mount(self, source: str, point: str, options: str, held: int) -> None:
        os.fstat(held)
        version = dict(each.partition("=")[::2] for each in options.split(","))["vers"]
        if version not in self.speaks:
            raise NotSpoken("requested NFS version is not supported", source)
        self.mounted.append((source, options))
        if self.covers:
            _mount("foreign", point, "tmpfs")
            return
        export = self.root / source.replace("/", "_")
        if not export.exists():
            export.mkdir()
            _mount(source, str(export), "tmpfs", data="size=64m")
        _mount(str(export), point, flags=_BIND)

    def unmount(self, point: str, held: int, *, lazily: bool = False) -> None:
        os.fstat(held)
        try:
            _unmount(point, lazily=lazily)
        except OSError as error:
            raise StoreUnavailable(str(error), point) from error

    def abort_requests(self, point: str, pid: int) -> None:
        raise AssertionError("nothing in memory hangs")


def _mount(source: str, point: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount without a process for each of hundreds of mounts."""
    if _LIBC.mount(source.encode(), point.encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), point)


def _unmount(point: str, *, lazily: bool = False) -> None:
    if _LIBC.umount2(point.encode(), _DETACH if lazily else 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), point)


@contextlib.contextmanager
def memory_exports(root: Path) -> Iterator[MemoryExports]:
    """Return exports that are unmounted at the end. Skip the test if this process may not mount."""
    probe = root / "probe"
    probe.mkdir(parents=True)
    try:
        _mount("probe", str(probe), "tmpfs")
    except PermissionError:
        missing("the right to mount", "run the test as root, in a container with CAP_SYS_ADMIN")
    _unmount(str(probe))
    exports = MemoryExports(root)
    try:
        yield exports
    finally:
        exports.forget()
        for each in reversed(mounts()):
            if each.point.startswith(f"{root.parent}/"):
                _unmount(each.point, lazily=True)
