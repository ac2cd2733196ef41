"""The VM's NFS server, which is the kernel's: tests export from it, fill it, stop it and block it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssvm_worker.stores.nfs.commands import MountCommands
from ssvm_worker.stores.nfs.export_id import MARKER
from ssvm_worker.stores.nfs.store import NfsSettings, NfsStore
from tests.nfs.hosts import Host, command, on_server
from tests.waiting import PATIENCE_S

ROOT = Path("/srv/nfs")
#: The server's address for alpha, beta and gamma, and another one behind routers.
ADDRESS, FOR_BETA, FOR_GAMMA, BEHIND = "10.9.1.1", "10.9.2.1", "10.9.3.1", "10.9.9.9"
CLIENTS = "10.9.0.0/16"
MOUNTS = Path("/run/scratch/mounts")
_OPTIONS = "rw,no_root_squash,no_subtree_check,insecure"
_CABLES = ("alpha", "beta", "gamma", "storage")
_numbers = itertools.count(1)


class Server:
    """The kernel's NFS server. Its exports are in memory, and survive a stop."""

    def __init__(self) -> None:
        self.host = on_server()
        self.host.run(_prepare)
        self.start()

    def start(self) -> None:
        """Start as after a boot; clients have ten seconds to reclaim their state."""
        self.host.run(command, "rpc.nfsd", "--grace-time", "10", "--lease-time", "10", "4")

    def stop(self) -> None:
        """Stop as after a kill: connections are reset, and clients' open files are forgotten."""
        self.host.run(command, "rpc.nfsd", "0")

    def heal(self) -> None:
        """Start and unblock the server after any test."""
        self.go_on()
        if self.host.run(_threads) == 0:
            self.start()

    def hang(self, address: str = "0.0.0.0/0") -> None:
        """Block all incoming TCP data from now on, or that for one address of the server."""
        match = ["u32", "match", "ip", "protocol", "6", "0xff", "match", "ip", "dst", address, "action", "drop"]
        for cable in _CABLES:
            self.host.run(command, "tc", "qdisc", "add", "dev", cable, "clsact")
            self.host.run(command, "tc", "filter", "add", "dev", cable, "ingress", "protocol", "ip", *match)

    def go_on(self) -> None:
        """Unblock all data."""
        for cable in _CABLES:
            self.host.run(subprocess.run, ["tc", "qdisc", "del", "dev", cable, "clsact"], stderr=subprocess.DEVNULL)

    def export(self, name: str, size: str = "64m") -> Export:
        """Export a new file system of that size under that name."""
        export = Export(self.host, name, next(_numbers))
        export.mount(size)
        export.offer()
        return export

    def clients(self) -> list[str]:
        """Return the server's NFS 4 clients in the kernel's notation."""
        return self.host.run(_clients)

    def close(self) -> None:
        """Stop the server and delete its exports."""
        self.stop()
        self.host.close()


@dataclass(frozen=True)
class Export:
    """One export."""

    host: Host
    name: str
    number: int

    @property
    def directory(self) -> Path:
        """Return its directory on the server."""
        return ROOT / self.name

    @property
    def url(self) -> str:
        """Return its URL for alpha."""
        return f"nfs://{ADDRESS}/{self.name}"

    def mount(self, size: str = "64m") -> None:
        """Mount an empty file system over the existing content."""
        self.host.run(os.makedirs, self.directory, exist_ok=True)
        self.host.run(command, "mount", "-t", "tmpfs", "-o", f"size={size}", self.name, str(self.directory))
        self.host.run(command, "exportfs", "-f")

    def unmount(self) -> None:
        """Unmount its file system, so that the content below is visible."""
        self.host.run(command, "umount", "-l", str(self.directory))
        self.host.run(command, "exportfs", "-f")

    def offer(self, number: int = 0) -> None:
        """Export the file system with that number; with another number the server knows no old handle."""
        options = f"{_OPTIONS},fsid={number or self.number}"
        self.host.run(command, "exportfs", "-o", options, f"{CLIENTS}:{self.directory}")

    def withdraw(self) -> None:
        """End the export."""
        self.host.run(command, "exportfs", "-u", f"{CLIENTS}:{self.directory}")

    def files(self) -> list[str]:
        """Return the relative paths of all its files on the server, except the marker."""
        return self.host.run(_files, self.directory)

    def read(self, name: str) -> bytes:
        """Return a file's content on the server."""
        return self.host.run(Path.read_bytes, self.directory / name)

    def put(self, name: str, data: bytes) -> None:
        """Write a file on the server."""
        self.host.run(_put, self.directory / name, data)

    def free(self) -> float:
        """Return the free share of its file system, 0 to 1. The server frees a deleted file's blocks later."""
        return self.host.run(_free, self.directory)

    def empty(self) -> None:
        """Delete all files but the marker, as another client might."""
        self.host.run(_empty, self.directory)

    def store(self, options: str = "", *, commands: MountCommands | None = None, **settings: Any) -> NfsStore:
        """Return a separate store on it, as another process of the host would have it."""
        given = {"mount_root": MOUNTS, "mount_s": PATIENCE_S, "probe_s": PATIENCE_S} | settings
        return NfsStore("primary", self.url + options, NfsSettings(**given), commands)


def _prepare() -> None:
    state = Path("/var/lib/nfs")
    for name in ("rpc_pipefs", "nfsdcld", "v4recovery"):
        (state / name).mkdir(parents=True, exist_ok=True)
    for name in ("etab", "rmtab"):
        (state / name).touch()
    ROOT.mkdir(parents=True)
    command("mount", "-t", "rpc_pipefs", "rpc_pipefs", str(state / "rpc_pipefs"))
    command("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
    command("mount", "-t", "tmpfs", "root", str(ROOT))
    command("exportfs", "-o", f"{_OPTIONS},fsid=0", f"{CLIENTS}:{ROOT}")
    for daemon in ("rpcbind", "nfsdcld", "rpc.mountd"):
        command(daemon)


def _threads() -> int:
    return int(Path("/proc/fs/nfsd/threads").read_text())


def _files(directory: Path) -> list[str]:
    found = (each.relative_to(directory).as_posix() for each in directory.rglob("*") if each.is_file())
    return sorted(each for each in found if each != MARKER)


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _clients() -> list[str]:
    return [each.read_text() for each in Path("/proc/fs/nfsd/clients").glob("*/info")]


def _free(directory: Path) -> float:
    usage = shutil.disk_usage(directory)
    return usage.free / usage.total


def _empty(directory: Path) -> None:
    for each in directory.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
        elif each.name != MARKER:
            each.unlink()
