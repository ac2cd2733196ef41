"""Run qemu-img to check the tables of an image, and to convert it. Only for images that were inspected before.

qemu-img always gets the format, because its probe would follow a hostile image. It gets absolute paths, an empty
working directory, no input and no environment. Limits of memory, CPU time and file size are set with prlimit(1).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.errors import ConfigError, CorruptImage, StoreFull, TooLarge, UnknownFormat
from ssvm_worker.units import GiB, MiB

from .detect import ASK_PUBLISHER

#: Formats to convert to, with the options of qemu-img.
TARGETS = {
    "qcow2": ("qcow2", ()),
    "raw": ("raw", ()),
    "vmdk": ("vmdk", ("-o", "subformat=streamOptimized")),
}
#: Formats to convert from, with their names in qemu-img.
_SOURCES = {"qcow2": "qcow2", "raw": "raw", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx"}
#: Address space. Cinder gives `qemu-img info` 1 GiB. A conversion also has threads and buffers, and used 0.4 GiB.
_MEMORY = 2 * GiB
#: Bytes of a disk per second of CPU: a quarter of the rate at which a streamOptimized VMDK is deflated.
_BYTES_PER_CPU_S = 8 * MiB
_MIN_CPU_S = 60
#: Exit status of `check`: unused clusters, which are harmless, and a format without a check, as raw and VHD.
_LEAKS, _NOT_SUPPORTED = 3, 63
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")


@dataclass(frozen=True)
class QemuImg:
    """Runner of qemu-img for one inspected image."""

    #: An absolute path. qemu-img needs no other directory.
    folder: Path
    #: The virtual size that the inspection found.
    virtual_size: int
    #: Called several times per second. An exception that it raises ends qemu-img.
    check: Callable[[], None]
    where: str

    def inspect(self, image: Path, format_: str) -> None:
        """Raise CorruptImage if the image's tables are wrong. A conversion of such an image can lose data silently."""
        status, output = self._run("check", "-q", "-f", _SOURCES[format_], str(image))
        if status not in (0, _LEAKS, _NOT_SUPPORTED):
            raise CorruptImage(f"qemu-img check finds errors in it: {output}", self.where, ASK_PUBLISHER)

    def convert(self, image: Path, format_: str, to: str, out: Path, add_bytes: Callable[[int], None]) -> None:
        """Write the image in another format to *out*. *add_bytes* gets the converted bytes of the disk at each step."""
        name, options = TARGETS[to]
        words = ("convert", "-p", "-f", _SOURCES[format_], "-O", name, *options, str(image), str(out))
        status, output = self._run(*words, add_bytes=add_bytes)
        if "No space left" in output:
            what = f"The scratch directory is full: {output}"
            raise StoreFull(what, self.where, "Free space in download.scratch_dir")
        # qemu-img ignores SIGXFSZ, so it gets EFBIG instead.
        if "File too large" in output or -status in (signal.SIGXFSZ, signal.SIGXCPU):
            what = f"The converted image exceeds the size of a disk of {self.virtual_size} bytes, or takes too long"
            raise TooLarge(what, self.where, ASK_PUBLISHER)
        if status:
            raise CorruptImage(f"qemu-img cannot convert it (status {status}): {output}", self.where, ASK_PUBLISHER)

    def _run(self, *words: str, add_bytes: Callable[[int], None] = lambda _: None) -> tuple[int, str]:
        """Return the exit status, and the end of standard error."""
        errors = self.folder / "errors"
        file_size = self.virtual_size + self.virtual_size // 64 + 64 * MiB  # with tables and headers
        cpu = _MIN_CPU_S + self.virtual_size // _BYTES_PER_CPU_S
        limits = (f"--as={_MEMORY}", f"--cpu={cpu}", f"--fsize={file_size}", "--core=0")
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [tool("prlimit"), *limits, "--", tool("qemu-img"), *words],
                cwd=self.folder,
                env={"LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            self._wait(process, add_bytes)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        return process.returncode, errors.read_bytes()[-1000:].decode("utf-8", "replace").strip()

    def _wait(self, process: subprocess.Popen[bytes], add_bytes: Callable[[int], None]) -> None:
        """Wait for the end. Read the progress, which is ``    (12.34/100%)`` and a carriage return."""
        assert process.stdout is not None
        pipe, done = process.stdout.fileno(), 0
        os.set_blocking(pipe, False)
        while process.poll() is None:
            self.check()
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                percents = _PERCENT.findall(_read_available(pipe))
                now = int(float(percents[-1]) * self.virtual_size / 100) if percents else done
                add_bytes(now - done)
                done = now


def _read_available(pipe: int) -> bytes:
    try:
        return os.read(pipe, 64 * 1024)
    except BlockingIOError:
        return b""


def tool(name: str) -> str:
    """Return the absolute path of a program. Raises ConfigError if it is missing."""
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"{name} is not installed on this worker", name, "Install qemu-utils and util-linux")
    return path


def refuse_source(format_: str, where: str) -> None:
    """Raise UnknownFormat for an image that is not a disk."""
    if format_ not in _SOURCES:
        raise UnknownFormat(f"The image is {format_}, which is not converted", where, "Omit convert_to")
