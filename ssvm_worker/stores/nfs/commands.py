"""Run ``mount.nfs``, ``umount`` and ``ip`` with a deadline. Only this module changes the mounts of the host.

The worker runs the commands as root, or with ``sudo -n`` and a rule that names these command lines:
docs/how-to/nfs.md.
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
#: Characters with a special meaning in sudoers(5) and its patterns.
_SUDOERS_SPECIAL = re.compile(r"[,:=\\\s*?\[\]!\"#]")
#: Seconds for which the worker aborts the requests of a killed process.
_ABORT_S = 600
#: Messages of mount.nfs and the kernel: the server does not support a version, or has other paths in that version.
_NOT_SUPPORTED = ("not supported", "No such file or directory", "No such device", "Invalid argument", "incorrect mount")
_REFUSED = ("access denied", "Permission denied", "Operation not permitted")


class NotSpoken(StoreUnavailable):
    """The server does not support this version of NFS. It may support an older version."""


class MountCommands(Protocol):
    """Commands that change mounts. *held* is a locked file; it stays locked until the command ends."""

    @property
    def fstypes(self) -> frozenset[str]:
        """The file system types of the worker's mounts."""

    def mount(self, source: str, point: str, options: str, held: int) -> None:
        """Mount an export. Raise NotSpoken, StoreDenied, StoreUnavailable or ConfigError."""

    def unmount(self, point: str, held: int, *, lazily: bool = False) -> None:
        """Unmount. Raise StoreUnavailable if the mount is in use, or the server does not answer."""

    def abort_requests(self, point: str, pid: int) -> None:
        """Abort the NFS requests of a process to a mount until the process ends. Return at once."""


@dataclass(frozen=True)
class SystemCommands:
    """The commands of this host."""

    #: Time limit in seconds. Then the command is killed, or left if it cannot be killed.
    deadline_s: float = 30.0
    route: NetworkPath = field(default_factory=NetworkPath)
    fstypes: frozenset[str] = frozenset({"nfs", "nfs4"})
    #: Called while a command runs. Raises to cancel.
    check: Callable[[], None] | None = None

    def mount(self, source: str, point: str, options: str, held: int) -> None:
        port = int(dict(each.partition("=")[::2] for each in options.split(","))["port"])
        self.route.ensure(source.partition(":/")[0], port, lambda command: self._run(command, source, held))
        failure = self._run(mount_command(source, point, options), source, held)
        if failure:
            raise mount_error(failure, source)
        self._check_route(source, point, port, held)

    def unmount(self, point: str, held: int, *, lazily: bool = False) -> None:
        failure = self._run(unmount_command(point, lazily=lazily), point, held)
        if failure:
            remedy = "`fuser -vm` lists the processes that use the mount"
            raise StoreUnavailable(f"The unmount failed: {failure}", point, remedy)

    def abort_requests(self, point: str, pid: int) -> None:
        # fsync and close wait for their pages, and SIGKILL cannot end this wait (filemap_fdatawait). `umount -f` does
        # not unmount a mount in use, but ends pending requests with EIO. The exit of the process begins new requests,
        # so the script repeats the command.
        if not (started := start_time(pid)):
            return
        script = abort_script(pid, started, shlex.join(full_command(abort_command(point))))
        subprocess.Popen(
            ["sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": _SBIN, "LC_ALL": "C"},
        )

    def _check_route(self, source: str, point: str, port: int, held: int) -> None:
        """Unmount an export that the kernel reaches over another network, and raise ConfigError.

        The kernel reuses the connection of another mount of the same server. NFS 4.1 servers have an identity, so the
        kernel recognises a server by another address (RFC 8881, 2.10.5: trunking).
        """
        used = next((each.options.get("addr", "") for each in reversed(mounts()) if each.point == point), "")
        if used and (wrong := self.route.wrong_source(used, port)):
            with contextlib.suppress(WorkerError):
                self.unmount(point, held)
            what = f"{source} is a server that this host has mounted by {used} already, which {wrong}"
            remedy = "Mount all exports of this server by its address in the storage network"
            raise ConfigError(what, "nfs.source_address", remedy)

    def _run(self, command: Sequence[str], location: str, held: int) -> str:
        """Run a command. Return the reason of a failure, or an empty text."""
        result = command_process.run(full_command(command), self.deadline_s, held, self.check)
        if result.code is None:
            what = f"{command[0]} has not ended within {self.deadline_s:g} s"
            raise StoreUnavailable(what, location, "Check that the server is up and that 2049/tcp is open")
        return reason(result.code, result.err) if result.code else ""


def reason(code: int, output: str) -> str:
    """Return the line with the reason of a failure: sudo prints it first, and mount.nfs last."""
    lines = output.strip().splitlines() or [f"exit status {code}"]
    return lines[0] if lines[0].startswith("sudo:") else lines[-1]


def abort_script(pid: int, started: str, abort: str, tries: int = _ABORT_S) -> str:
    """Return a shell script that runs *abort* each second while a process lives.

    The script compares the start time: another process with the same number has another start time.
    """
    return (
        f"for n in $(seq {tries}); do read -r line < /proc/{pid}/stat || exit; "
        f'set -f; set -- ${{line##*)}}; [ "${{20}}" = {started} ] || exit; {abort}; sleep 1; done'
    )


def start_time(pid: int) -> str:
    """Return a process's start time in ticks since the boot: field 22 of proc_pid_stat(5). Empty: no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # the process name may have spaces and brackets


def mount_command(source: str, point: str, options: str) -> list[str]:
    """Return the command that mounts an export."""
    return ["mount.nfs", source, point, "-o", options]


def unmount_command(point: str, *, lazily: bool = False) -> list[str]:
    """Return the command that unmounts. A lazy unmount detaches a mount in use at once."""
    return ["umount", *(["-l"] if lazily else []), point]


def abort_command(point: str) -> list[str]:
    """Return the command that aborts the pending requests to an export."""
    return ["umount", "-f", point]


def full_command(command: Sequence[str]) -> list[str]:
    """Return the command with its path, and with ``sudo -n`` if the worker is not root.

    Raises ConfigError if the command is not installed.
    """
    found = _by_path(command)
    return found if os.geteuid() == 0 else [shutil.which("sudo") or "sudo", "-n", *found]


def sudo_rule(user: str, commands: Sequence[Sequence[str]]) -> str:
    """Return a sudoers rule that allows a user exactly these commands."""
    lines = (" ".join(_SUDOERS_SPECIAL.sub(r"\\\g<0>", word) for word in _by_path(each)) for each in commands)
    return "Cmnd_Alias SSVM_NFS = \\\n  " + ", \\\n  ".join(lines) + f"\n{user} ALL=(root) NOPASSWD: SSVM_NFS\n"


def _by_path(command: Sequence[str]) -> list[str]:
    path = shutil.which(command[0], path=_SBIN)
    if path is None:
        package = {"mount.nfs": "nfs-common (Debian) or nfs-utils", "ip": "iproute2"}.get(command[0], "mount")
        raise ConfigError(f"{command[0]} is not installed", "stores", f"Install the package {package}")
    return [path, *command[1:]]


def mount_error(failure: str, source: str) -> WorkerError:
    """Return the error for the message of a failed mount command."""
    if failure.startswith("sudo:"):
        remedy = "Add the sudo rule that `ssvm stores --sudoers USER` prints: docs/how-to/nfs.md, Rights"
        if "no new privileges" in failure:
            remedy = (
                "The unit has NoNewPrivileges=yes. Add its drop-in nfs.conf, or use /etc/fstab: "
                "docs/how-to/nfs.md, systemd"
            )
        return ConfigError(f"The worker may not mount: {failure}", source, remedy)
    if any(each in failure for each in _REFUSED):
        return StoreDenied(f"The server refuses the mount: {failure}", source, "Check its exports for this host")
    what = f"The mount failed: {failure}"
    if any(each in failure for each in _NOT_SUPPORTED):
        return NotSpoken(what, source, "`showmount -e` lists the exports of the server")
    return StoreUnavailable(what, source, "Check that the server is up and that 2049/tcp is open")
