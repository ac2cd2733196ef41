"""Boot a guest, watch its screen until it no longer changes or the time is up, and end it."""

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

from ssvm_worker.config.schema import BootSection
from ssvm_worker.errors import ConfigError
from ssvm_worker.units import MiB

from .command_line import BootMachine, command
from .qmp import Monitor, MonitorError
from .screenshot import Picture, read_ppm

Check = Callable[[], None]

#: Messages of SeaBIOS on its debug port (src/boot.c): no disk has a boot sector; the jump into one, "0000:7c00".
_NOTHING_TO_BOOT, _BOOT_SECTOR_STARTED = b"No bootable device", b"Booting from 0"
_POLL_S = 1.0
#: CPU seconds per second of the guest: for its processor, and for QEMU's own threads.
_CPU_PER_S = 2
#: CPU seconds of QEMU for start and end.
_CPU_EXTRA = 60


@dataclass(frozen=True)
class BootOutcome:
    """Result of a boot."""

    #: still | changing | blank
    screen: str
    picture: Picture
    #: Seconds since power on.
    seconds: float
    #: False if the BIOS reports that there is nothing to boot.
    bootable: bool
    #: Whether the guest ran on the real processor. A translated one is about ten times slower.
    kvm: bool
    #: Events such as SHUTDOWN and GUEST_PANICKED.
    events: tuple[str, ...]
    #: Why KVM could not run the guest, if TCG ran it instead. Empty if KVM worked or was not tried.
    kvm_failure: str = ""


def boot(machine: BootMachine, folder: Path, limits: BootSection, check: Check) -> BootOutcome:
    """Boot *machine*. *folder* takes the overlay and the screen. *check* is called every second, and may raise.

    If QEMU fails under KVM and the accelerator is ``auto``, boot again under TCG. /dev/kvm may exist but not work. Then
    QEMU aborts before the guest runs (seen on nested AMD: "failed to set MSR"), or the guest stops with an internal
    error.

    Raises ConfigError if QEMU is missing, cannot start, or fails.
    """
    failure = ""
    if machine.accelerator == "auto":
        try:
            return _boot(machine, folder, limits, check)
        except MonitorError as error:
            failure = _failure(error, folder)
            machine = dataclasses.replace(machine, accelerator="tcg")
    try:
        return dataclasses.replace(_boot(machine, folder, limits, check), kvm_failure=failure)
    except MonitorError as error:
        remedy = "Check that `qemu-system-x86_64 --version` works. Set boot.accelerator to tcg if KVM is the cause"
        raise ConfigError(f"QEMU failed: {_failure(error, folder)}", "qemu-system-x86_64", remedy) from error


def try_accelerator(accelerator: str) -> BootOutcome:
    """Start QEMU without disks until its BIOS has run, to find out which accelerator works.

    Raises ConfigError as ``boot`` does.
    """
    with tempfile.TemporaryDirectory(prefix="ssvm-qemu-") as folder:
        return boot(
            BootMachine([], 64 * MiB, accelerator=accelerator),
            Path(folder),
            BootSection(seconds=60, still_s=20),
            lambda: None,
        )


def _failure(error: MonitorError, folder: Path) -> str:
    """Return the text of *error*, with the last line that QEMU wrote to standard error."""
    lines = (folder / "errors").read_bytes()[-1000:].decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{error}: {last}" if last else str(error)


def _boot(machine: BootMachine, folder: Path, limits: BootSection, check: Check) -> BootOutcome:
    log = folder / "firmware.log"
    with _running(machine, folder, log, limits) as sock:
        bios_log = log if machine.firmware == "bios" else None
        return _Watch(Monitor(sock, check), folder / "screen.ppm", bios_log, check).run(limits)


@contextlib.contextmanager
def _running(machine: BootMachine, folder: Path, log: Path, limits: BootSection) -> Iterator[socket.socket]:
    """Run QEMU and yield the socket of its monitor. Kill QEMU at the end in any case."""
    ours, theirs = socket.socketpair()
    with ours, theirs, (folder / "errors").open("wb") as stderr:
        words = command(machine, theirs.fileno(), log, _CPU_EXTRA + int(_CPU_PER_S * limits.seconds))
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
    """Observer of a guest. *log* is the log of its BIOS, or None for firmware without a log."""

    def __init__(self, monitor: Monitor, screen_file: Path, log: Path | None, check: Check) -> None:
        self._monitor = monitor
        self._screen_file = screen_file
        self._log = log
        self._check = check
        self._started = 0.0

    def run(self, limits: BootSection) -> BootOutcome:
        """Start the guest, look at it every second, and return the outcome."""
        initial = self._screen()  # QEMU shows its own text until the guest draws
        self._monitor.ask("cont")
        self._started = since = time.monotonic()
        shown = initial
        while True:
            self._check()
            time.sleep(_POLL_S)
            now, picture, messages = time.monotonic(), self._screen(), self._messages()
            if not picture.is_like(shown) or _BOOT_SECTOR_STARTED not in messages:
                shown, since = picture, now  # slow firmware has a still screen too, so it does not count
            blank = picture.is_blank or picture.is_like(initial)
            still, nothing = now - since >= limits.still_s, _NOTHING_TO_BOOT in messages
            ended = nothing or self._has_stopped()
            timed_out = now - self._started >= limits.seconds
            if ended or timed_out or (still and not blank):
                screen = "blank" if blank else "still" if still or ended else "changing"
                kvm = bool(self._monitor.ask("query-kvm")["enabled"])
                events = tuple(dict.fromkeys(self._monitor.events))
                return BootOutcome(screen, picture, round(now - self._started, 1), not nothing, kvm, events)

    def _has_stopped(self) -> bool:
        """Return whether the guest has powered itself off, or panicked."""
        if "STOP" not in self._monitor.events:
            return False
        status = self._monitor.ask("query-status")["status"]
        if status == "internal-error":
            raise MonitorError("the guest used an instruction that the accelerator cannot run")
        return True

    def _screen(self) -> Picture:
        self._monitor.ask("screendump", filename=str(self._screen_file))
        try:
            return read_ppm(self._screen_file.read_bytes())
        except ValueError as error:
            raise MonitorError(f"the screendump cannot be read: {error}") from error

    def _messages(self) -> bytes:
        """Return the messages of the BIOS. Firmware without a log counts as having started the boot sector."""
        if self._log is None:
            return _BOOT_SECTOR_STARTED
        return self._log.read_bytes() if self._log.exists() else b""
