"""Boots a guest, watches its screen until that stands still or time is up, and ends it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.errors import ConfigError
from ssvm_worker.units import MiB

from .command_line import BootMachine, command
from .qmp import Monitor, MonitorError
from .screenshot import Picture, read_ppm

Check = Callable[[], None]

#: What SeaBIOS says to its debug port (src/boot.c): no disk has a boot sector; it jumps into one, "0000:7c00".
_NOTHING_TO_BOOT, _HANDED_OVER = b"No bootable device", b"Booting from 0"
_POLL_S = 1.0
#: CPU seconds for one second that the guest may run: its processor, and QEMU's own threads.
_CPU = 2
#: CPU seconds that QEMU may have beside that, to start and to end.
_CPU_BESIDE = 60


@dataclass(frozen=True)
class BootTimeouts:
    """How long a guest is watched, in seconds."""

    #: At the most.
    most: float = 180.0
    #: Its screen has not changed for so long: what was to come has come.
    still: float = 20.0


@dataclass(frozen=True)
class BootOutcome:
    """What became of a boot."""

    #: still | changing | blank
    screen: str
    picture: Picture
    #: Seconds since power on.
    seconds: float
    #: False where the BIOS says that there is nothing to boot.
    bootable: bool
    #: Whether the processor was the real one; a translated one is some ten times slower.
    kvm: bool
    #: The guest powered itself off, or panicked and told.
    events: tuple[str, ...]
    #: Why KVM could not run the guest, so that TCG did; empty if KVM was not tried or worked.
    kvm_failure: str = ""


def boot(machine: BootMachine, folder: Path, patience: BootTimeouts, check: Check) -> BootOutcome:
    """Boot *machine* in *folder*, which takes the overlay and the screen; call *check* each second, which may raise.

    If QEMU fails under KVM and ``auto`` was asked for, boot again under TCG. /dev/kvm may exist and not work: QEMU then
    aborts before the guest runs (seen on AMD, nested: "failed to set MSR"), or the guest stops with an internal error.

    Raises ConfigError if QEMU is missing, cannot start, or fails.
    """
    failure = ""
    if machine.accelerator == "auto":
        try:
            return _boot(machine, folder, patience, check)
        except MonitorError as error:
            failure = _failure(error, folder)
            machine = dataclasses.replace(machine, accelerator="tcg")
    try:
        return dataclasses.replace(_boot(machine, folder, patience, check), kvm_failure=failure)
    except MonitorError as error:
        remedy = "Check that `qemu-system-x86_64 --version` works. Set boot.accelerator to tcg if KVM is the cause"
        raise ConfigError(f"QEMU failed: {_failure(error, folder)}", "qemu-system-x86_64", remedy) from error


def try_accelerator(accelerator: str) -> BootOutcome:
    """Start QEMU without disks until its BIOS has run, to find out which accelerator works.

    Raises ConfigError as ``boot`` does.
    """
    with tempfile.TemporaryDirectory(prefix="ssvm-qemu-") as folder:
        return boot(
            BootMachine([], 64 * MiB, accelerator=accelerator), Path(folder), BootTimeouts(60, 20), lambda: None
        )


def _failure(error: MonitorError, folder: Path) -> str:
    """Return *error* with the last line that QEMU wrote to its standard error."""
    lines = (folder / "errors").read_bytes()[-1000:].decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{error}: {last}" if last else str(error)


def _boot(machine: BootMachine, folder: Path, patience: BootTimeouts, check: Check) -> BootOutcome:
    log = folder / "firmware.log"
    with _running(machine, folder, log, patience) as sock:
        bios = log if machine.firmware == "bios" else None
        return _Watch(Monitor(sock, check), folder / "screen.ppm", bios, check).until(patience)


@contextlib.contextmanager
def _running(machine: BootMachine, folder: Path, log: Path, patience: BootTimeouts) -> Iterator[socket.socket]:
    """QEMU with our end of its monitor; it is killed at the end, whatever it does."""
    ours, theirs = socket.socketpair()
    with ours, theirs, (folder / "errors").open("wb") as stderr:
        words = command(machine, theirs.fileno(), log, _CPU_BESIDE + int(_CPU * patience.most))
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={"LC_ALL": "C", "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        try:
            yield ours
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Watch:
    """Looks at a guest each second. *log*: what its BIOS says; None for a firmware that says nothing."""

    def __init__(self, monitor: Monitor, file: Path, log: Path | None, check: Check) -> None:
        self._monitor = monitor
        self._file = file
        self._log = log
        self._check = check
        self._started = 0.0

    def until(self, patience: BootTimeouts) -> BootOutcome:
        """What was seen when there is no more to come, or time is up."""
        off = self._look()  # QEMU shows a text of its own until the guest draws
        self._monitor.ask("cont")
        self._started = since = time.monotonic()
        shown = off
        while True:
            self._check()
            time.sleep(_POLL_S)
            now, picture, said = time.monotonic(), self._look(), self._said()
            if not picture.is_like(shown) or _HANDED_OVER not in said:
                shown, since = picture, now  # a firmware that takes its time stands still too
            blank = picture.is_blank or picture.is_like(off)
            still, nothing = now - since >= patience.still, _NOTHING_TO_BOOT in said
            over = nothing or self._has_stopped()
            late = now - self._started >= patience.most
            if over or late or (still and not blank):
                screen = "blank" if blank else "still" if still or over else "changing"
                kvm = bool(self._monitor.ask("query-kvm")["enabled"])
                events = tuple(dict.fromkeys(self._monitor.events))
                return BootOutcome(screen, picture, round(now - self._started, 1), not nothing, kvm, events)

    def _has_stopped(self) -> bool:
        """Whether the guest has powered itself off, or panicked."""
        if "STOP" not in self._monitor.events:
            return False
        status = self._monitor.ask("query-status")["status"]
        if status == "internal-error":
            raise MonitorError("the processor met an instruction that the accelerator cannot run")
        return True

    def _look(self) -> Picture:
        self._monitor.ask("screendump", filename=str(self._file))
        try:
            return read_ppm(self._file.read_bytes())
        except ValueError as error:
            raise MonitorError(f"its picture cannot be read: {error}") from error

    def _said(self) -> bytes:
        if self._log is None:
            return _HANDED_OVER
        return self._log.read_bytes() if self._log.exists() else b""
