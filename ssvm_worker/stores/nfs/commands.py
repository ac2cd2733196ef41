"""``mount.nfs``, ``umount`` and ``ip`` as commands with a deadline: the one place that changes what is mounted.

As root, or through ``sudo -n`` by a rule that names these command lines (docs/nfs.md).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ssvm_worker.errors import ConfigError, StoreDenied, StoreUnavailable, WorkerError

from . import command_process
from .mountinfo import mounts
from .network_path import NetworkPath

_SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"
#: What means something in sudoers(5), and what in its patterns.
_SPECIAL = re.compile(r"[,:=\\\s*?\[\]!\"#]")
#: Seconds for which calls of a process that is to die are failed.
_LET_DIE_S = 600
#: What mount.nfs and the kernel say of a server that does not speak a version, or shows other paths in it.
_NOT_SPOKEN = ("not supported", "No such file or directory", "No such device", "Invalid argument", "incorrect mount")
_REFUSED = ("access denied", "Permission denied", "Operation not permitted")


class NotSpoken(StoreUnavailable):
    """The server may yet speak an older version."""


class MountCommands(Protocol):
    """Changes what is mounted. *held* is a locked file that stays locked for as long as the command lives."""

    @property
    def fstypes(self) -> frozenset[str]:
        """File systems that may be taken for a mount of ours."""

    def mount(self, source: str, point: str, options: str, held: int) -> None:
        """Raises NotSpoken, StoreDenied, StoreUnavailable, ConfigError."""

    def unmount(self, point: str, held: int, *, lazily: bool = False) -> None:
        """Raises StoreUnavailable: it is in use, or does not answer."""

    def let_die(self, point: str, pid: int) -> None:
        """From now on fail the calls of that process to what is mounted there, until it is gone. Returns at once."""


@dataclass(frozen=True)
class SystemCommands:
    """The machine's own."""

    #: Seconds after which a command is killed, or left alone where it cannot be.
    deadline_s: float = 30.0
    route: NetworkPath = field(default_factory=NetworkPath)
    fstypes: frozenset[str] = frozenset({"nfs", "nfs4"})
    #: Heard while a command runs.
    check: Callable[[], None] | None = None

    def mount(self, source: str, point: str, options: str, held: int) -> None:
        port = int(dict(each.partition("=")[::2] for each in options.split(","))["port"])
        self.route.see_to(source.partition(":/")[0], port, lambda command: self._run(command, source, held))
        wrong = self._run(mount_command(source, point, options), source, held)
        if wrong:
            raise explained(wrong, source)
        self._check_way(source, point, port, held)

    def unmount(self, point: str, held: int, *, lazily: bool = False) -> None:
        wrong = self._run(unmount_command(point, lazily=lazily), point, held)
        if wrong:
            raise StoreUnavailable(f"It cannot be unmounted: {wrong}", point, "`fuser -vm` says who uses it")

    def let_die(self, point: str, pid: int) -> None:
        # fsync and close wait for their pages in a way that not even SIGKILL ends (filemap_fdatawait). `umount -f`
        # unmounts nothing that is in use, but ends with EIO what is under way; and again what the exit begins.
        if not (started := start_time(pid)):
            return
        script = let_die_script(pid, started, shlex.join(full_command(abort_command(point))))
        subprocess.Popen(
            ["sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": _SBIN, "LC_ALL": "C"},
        )

    def _check_way(self, source: str, point: str, port: int, held: int) -> None:
        """Unmount what the kernel reaches by another way: it takes the connections of a mount of the same server.

        NFS 4.1 servers tell who they are, whatever address they were asked by (RFC 8881, 2.10.5: trunking).
        """
        taken = next((each.options.get("addr", "") for each in reversed(mounts()) if each.point == point), "")
        if taken and (wrong := self.route.astray(taken, port)):
            with contextlib.suppress(WorkerError):
                self.unmount(point, held)
            what = f"{source} is a server that this host has mounted by {taken} already, which {wrong}"
            remedy = "Mount all that this server exports by its address in the storage network"
            raise ConfigError(what, "nfs.source_address", remedy)

    def _run(self, command: Sequence[str], where: str, held: int) -> str:
        """What it says of its failure; empty if there is none."""
        ran = command_process.run(full_command(command), self.deadline_s, held, self.check)
        if ran.code is None:
            what = f"{command[0]} has not ended within {self.deadline_s:g} s"
            raise StoreUnavailable(what, where, "Is the server up, and 2049/tcp open to it?")
        return reason(ran.code, ran.err) if ran.code else ""


def reason(code: int, said: str) -> str:
    """The line that tells why a command failed: sudo says it first, mount.nfs last."""
    lines = said.strip().splitlines() or [f"it ended with {code}"]
    return lines[0] if lines[0].startswith("sudo:") else lines[-1]


def let_die_script(pid: int, started: str, failing: str, tries: int = _LET_DIE_S) -> str:
    """Run *failing* each second while that process lives; another that gets its number has another start time."""
    return (
        f"for n in $(seq {tries}); do read -r line < /proc/{pid}/stat || exit; "
        f'set -f; set -- ${{line##*)}}; [ "${{20}}" = {started} ] || exit; {failing}; sleep 1; done'
    )


def start_time(pid: int) -> str:
    """When the process began, in ticks since the boot: field 22 of proc_pid_stat(5); empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # the name before may have blanks and brackets


def mount_command(source: str, point: str, options: str) -> list[str]:
    """The one that mounts."""
    return ["mount.nfs", source, point, "-o", options]


def unmount_command(point: str, *, lazily: bool = False) -> list[str]:
    """The one that unmounts; lazily: at once, though it is in use."""
    return ["umount", *(["-l"] if lazily else []), point]


def abort_command(point: str) -> list[str]:
    """The one that fails what is under way to an export."""
    return ["umount", "-f", point]


def full_command(command: Sequence[str]) -> list[str]:
    """The command by its path, behind ``sudo -n`` where we are not root; ConfigError where it is not there."""
    found = _by_path(command)
    return found if os.geteuid() == 0 else [shutil.which("sudo") or "sudo", "-n", *found]


def sudo_rule(user: str, commands: Sequence[Sequence[str]]) -> str:
    """A rule for sudoers by which that user may run these commands, each to the letter."""
    lines = (" ".join(_SPECIAL.sub(r"\\\g<0>", word) for word in _by_path(each)) for each in commands)
    return "Cmnd_Alias SSVM_NFS = \\\n  " + ", \\\n  ".join(lines) + f"\n{user} ALL=(root) NOPASSWD: SSVM_NFS\n"


def _by_path(command: Sequence[str]) -> list[str]:
    path = shutil.which(command[0], path=_SBIN)
    if path is None:
        package = {"mount.nfs": "nfs-common (Debian) or nfs-utils", "ip": "iproute2"}.get(command[0], "mount")
        raise ConfigError(f"{command[0]} is not installed", "stores", f"Install the package {package}")
    return [path, *command[1:]]


def explained(said: str, source: str) -> WorkerError:
    """The error for what a mount command says."""
    if said.startswith("sudo:"):
        remedy = "Add the sudo rule that `ssvm stores --sudoers USER` prints: docs/nfs.md, Rights"
        if "no new privileges" in said:
            remedy = (
                "The unit has NoNewPrivileges=yes. Add its drop-in nfs.conf, or use /etc/fstab: docs/nfs.md, systemd"
            )
        return ConfigError(f"The worker may not mount: {said}", source, remedy)
    if any(each in said for each in _REFUSED):
        return StoreDenied(f"The server refuses the mount: {said}", source, "Look at its exports for this host")
    if any(each in said for each in _NOT_SPOKEN):
        return NotSpoken(f"It cannot be mounted: {said}", source, "`showmount -e` lists what the server exports")
    return StoreUnavailable(f"It cannot be mounted: {said}", source, "Is the server up, and 2049/tcp open to it?")
