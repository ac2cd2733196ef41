"""A small VM with a real NFS server and real clients: this machine's own files under a Debian kernel.

The kernel is user-mode Linux, a process that runs programs at full speed. Where that does not work, QEMU emulates a
machine, ten times slower. The VM has its own network and runs this directory's tests in its own pytest, as root. It
reports each test as it ends. Nothing of this machine is mounted, exported or listened on.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssvm_worker.demo import go_program, simulator

ROOT = Path(__file__).resolve().parents[2]
_MADE = ROOT / ".cache/vm"
_PYTHON = _MADE / "venv/bin/python"
_UML = _MADE / "kernel/usr/bin/linux.uml"
_SBIN = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
#: Commands, and the Debian packages that contain them.
_COMMANDS = {
    "modprobe": "kmod",
    "ip": "iproute2",
    "mount.nfs": "nfs-common",
    "rpc.nfsd": "nfs-kernel-server",
}
#: Additional programs for QEMU.
_FOR_QEMU = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "mkfs.ext4": "e2fsprogs",
    "vng": "virtme-ng, of PyPI",
}
#: Parts of the standard library that no test needs.
_UNREAD = ("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "config-*", "ensurepip")
#: Seconds without a report, and in total, after which a hanging VM is killed. A case has less time (guest.sh).
_SILENCE_S, _ALL_S = 2500.0, 4600.0
#: Lines that are shown of each log if the VM ended early.
_LAST = 60


class VM:
    """The VM boots at the first request for a report, and ends after its tests or by ``close``."""

    def __init__(self, cases: list[str]) -> None:
        self._cases = cases
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._read, self._told = 0, False
        self._directory = Path(tempfile.mkdtemp(prefix="nfs-vm-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._leash: subprocess.Popen[bytes] | None = None
        self._started = self._heard = time.monotonic()

    def reports(self, case: str) -> list[dict[str, Any]] | None:
        """Return pytest's reports about that case when it has ended, or None if the VM ended earlier."""
        if self._process is None:
            self._boot()
        while not self._has_ended(case):
            alive = self._is_alive()
            self._follow()
            if not alive and not self._has_ended(case):
                return None
            time.sleep(0.1)
        return self._reports[case]

    def last_words(self) -> str:
        """Return the end of the VM's output at the first call."""
        said, self._told = "" if self._told else "\n".join(_ends(self._directory)), True
        return said

    def close(self) -> None:
        """End the VM, and leave nothing."""
        if self._process is not None:
            self._kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _boot(self) -> None:
        directory = self._directory
        (directory / "cases").write_text("".join(f"{case}\n" for case in self._cases))
        (directory / "reports").touch()
        kernel = "uml" if _UML.exists() else "qemu"
        environment = {"PATH": _SBIN, "PYTHON": str(_PYTHON), "CI": os.environ.get("CI", ""), "KERNEL": kernel}
        environment |= {"ROOT": str(ROOT), "HOME": str(Path.home())}
        (directory / "environment").write_text("".join(f"{k}={shlex.quote(v)}\n" for k, v in environment.items()))
        command = _user_mode(directory) if kernel == "uml" else _emulated(directory)
        self._started = self._heard = time.monotonic()
        with open(directory / "console", "wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PATH": _SBIN},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # The VM ends when this process ends for any reason.
        self._leash = subprocess.Popen(
            ["sh", "-c", f"read _; kill -s KILL -- -{self._process.pid}"], stdin=subprocess.PIPE, start_new_session=True
        )

    def _is_alive(self) -> bool:
        assert self._process
        now = time.monotonic()
        if now - self._heard > _SILENCE_S or now - self._started > _ALL_S:
            self._kill()
        return self._process.poll() is None

    def _kill(self) -> None:
        assert self._process
        assert self._leash
        self._leash.kill()
        self._leash.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _follow(self) -> None:
        """Read the complete new lines."""
        with open(self._directory / "reports", "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                report = json.loads(line)
                self._reports.setdefault(report["nodeid"], []).append(report)
                self._heard = time.monotonic()

    def _has_ended(self, case: str) -> bool:
        return any(report["when"] == "teardown" for report in self._reports.get(case, []))


def lacking() -> tuple[str, str] | None:
    """Return what this machine lacks for the VM, and how to install it."""
    if platform.machine() != "x86_64":
        return "an x86-64 machine", "the VM is one, with this machine's own files"
    for command, package in (_COMMANDS if _UML.exists() else _COMMANDS | _FOR_QEMU).items():
        if shutil.which(command, path=_SBIN) is None:
            return f"{command}, for the VM with an NFS server,", f"install {package}"
    if not _PYTHON.exists() or not (_UML.exists() or list(_kernels())):
        return "the VM's kernel or its Python", "`make test-nfs` makes them, where Debian's packages can be had"
    return None


def _kernels() -> Iterator[Path]:
    return (_MADE / "kernel/boot").glob("vmlinuz-*")


def _user_mode(directory: Path) -> list[str]:
    """Return the command that starts a user-mode Linux: a kernel as a process, which runs programs at full speed."""
    given = ["root=none", "rootfstype=hostfs", "hostfs=/", "ro", f"init={ROOT}/tests/nfs/init.sh"]
    return [str(_UML), "mem=2G", *given, "con=null", "con0=null,fd:1", "quiet", f"guest={directory}"]


def _emulated(directory: Path) -> list[str]:
    """Return the command that boots Debian's kernel under QEMU, many times slower."""
    places = _places()
    (directory / "places").write_text("".join(f"{place}\n" for place in places))
    image = _image(directory, places)
    command = ["vng", "-r", str(next(_kernels())), "--disable-kvm", "--force-9p", "--memory", "2G", "--cpus", "2"]
    command += ["--user", "root", "--rwdir", str(directory), "--verbose"]
    # A disk with Python, and a second, cached mount of this machine's files.
    command += [f"--qemu-opts=-drive file={image},if=virtio,format=raw,readonly=on"]
    command += ["--qemu-opts=-fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"]
    command += ["--qemu-opts=-device virtio-9p-pci,fsdev=host,mount_tag=host"]
    return [*command, "--exec", f"bash tests/nfs/guest.sh {directory}"]


def _places() -> list[Path]:
    """Return the VM's disk content: thousands of small files, which are slow to read over 9p."""
    ours = (ROOT / each for each in ("ssvm_worker", "tasks", "tests"))
    return [Path(sysconfig.get_path("stdlib")), _MADE / "venv", *ours]


def _image(directory: Path, places: list[Path]) -> Path:
    image, staged = directory / "disk", directory / "staged"
    for place in places:
        unread = shutil.ignore_patterns(*_UNREAD) if place == places[0] else None
        shutil.copytree(place, staged / place.relative_to("/"), symlinks=True, ignore=unread)
    if go_program.find_go() is not None:
        (staged / "cache/ssvm-worker").mkdir(parents=True)
        shutil.copy2(simulator.build(), staged / "cache/ssvm-worker")
    size = sum(each.lstat().st_size + 4096 for each in staged.rglob("*"))
    with open(image, "wb") as file:
        file.truncate(size * 5 // 4 + (32 << 20))
    command = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", str(staged), str(image)]
    subprocess.run(command, env={"PATH": _SBIN}, check=True)
    shutil.rmtree(staged)
    return image


def _ends(directory: Path) -> Iterator[str]:
    for name in ("console", "guest"):
        path = directory / name
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        yield f"--- {name}"
        yield from lines[-_LAST:]
