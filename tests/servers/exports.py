"""Exports without a server. A tmpfs is mounted under an export's name, so mountinfo shows an export."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.stores.nfs.commands import NotSpoken
from ssvm_worker.stores.nfs.mountinfo import mounts
from tests.neighbours import missing

#: Only of this process. The same table also has the mounts of other test processes.
ADDRESS = f"10.{os.getpid() >> 16 & 255}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"


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
        data = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        if ctypes.CDLL(None, use_errno=True).mount(source.encode(), point.encode(), b"fuse", 0, data):
            raise OSError(ctypes.get_errno(), "mount of FUSE")
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
            _run("mount", "-t", "tmpfs", "foreign", point)
            return
        export = self.root / source.replace("/", "_")
        if not export.exists():
            export.mkdir()
            _run("mount", "-t", "tmpfs", "-o", "size=64m", source, str(export))
        _run("mount", "--bind", str(export), point)

    def unmount(self, point: str, held: int, *, lazily: bool = False) -> None:
        os.fstat(held)
        try:
            _run("umount", *(["-l"] if lazily else []), point)
        except subprocess.CalledProcessError as error:
            raise StoreUnavailable(error.stderr.decode(), point) from error

    def abort_requests(self, point: str, pid: int) -> None:
        raise AssertionError("nothing in memory hangs")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def memory_exports(root: Path) -> Iterator[MemoryExports]:
    """Return exports that are unmounted at the end. Skip the test if this process may not mount."""
    probe = root / "probe"
    probe.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "probe", str(probe)], capture_output=True).returncode:
        missing("the right to mount", "run the test as root, in a container with CAP_SYS_ADMIN")
    _run("umount", str(probe))
    exports = MemoryExports(root)
    try:
        yield exports
    finally:
        exports.forget()
        for each in reversed(mounts()):
            if each.point.startswith(f"{root.parent}/"):
                _run("umount", "-l", each.point)
