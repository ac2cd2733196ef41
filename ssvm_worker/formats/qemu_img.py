"""qemu-img, for what only it can do: checking an image through, and converting it. Never let loose on an unjudged one.

It is told the format always (a probe would follow what a hostile image names), gets absolute paths, an empty folder to
stand in, nothing to read from, no environment, and limits of its own by prlimit(1): memory, CPU time, size of a file.
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

#: What an image may be converted to, and how.
TARGETS = {
    "qcow2": ("qcow2", ()),
    "raw": ("raw", ()),
    "vmdk": ("vmdk", ("-o", "subformat=streamOptimized")),
}
#: Our names and its, of what may be converted.
_SOURCES = {"qcow2": "qcow2", "raw": "raw", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx"}
#: Address space. Cinder gives `qemu-img info` 1 GiB; a convert has threads and buffers besides, and used 0.4 here.
_MEMORY = 2 * GiB
#: Bytes of a disk for one second of CPU: a quarter of what deflating a streamOptimized VMDK needs.
_BYTES_PER_CPU_S = 8 * MiB
_LEAST_CPU_S = 60
#: Exit status of `check`: clusters that nobody uses do no harm; raw and VHD have nothing to check.
_LEAKS, _NOT_SUPPORTED = 3, 63
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")


@dataclass(frozen=True)
class QemuImg:
    """qemu-img on one judged image."""

    #: Absolute; the only folder that it needs.
    folder: Path
    #: Of the image, as our inspection found it.
    virtual_size: int
    #: Called several times a second while it runs; what it raises ends qemu-img.
    check: Callable[[], None]
    where: str

    def inspect(self, image: Path, format_: str) -> None:
        """Raise CorruptImage if the image's tables are wrong; a convert of such a one may end well and lack data."""
        status, said = self._run("check", "-q", "-f", _SOURCES[format_], str(image))
        if status not in (0, _LEAKS, _NOT_SUPPORTED):
            raise CorruptImage(f"qemu-img check finds errors in it: {said}", self.where, ASK_PUBLISHER)

    def convert(self, image: Path, format_: str, to: str, out: Path, saw: Callable[[int], None]) -> None:
        """Write the image in another format to *out*; *saw* gets the bytes of the disk that each step has done."""
        name, options = TARGETS[to]
        words = ("convert", "-p", "-f", _SOURCES[format_], "-O", name, *options, str(image), str(out))
        status, said = self._run(*words, saw=saw)
        if "No space left" in said:
            raise StoreFull(f"The scratch directory is full: {said}", self.where, "Make room in download.scratch_dir")
        # qemu-img ignores SIGXFSZ, and is told EFBIG in its place.
        if "File too large" in said or -status in (signal.SIGXFSZ, signal.SIGXCPU):
            what = f"The image becomes more than a disk of {self.virtual_size} bytes can, or takes too long"
            raise TooLarge(what, self.where, ASK_PUBLISHER)
        if status:
            raise CorruptImage(f"qemu-img cannot convert it (status {status}): {said}", self.where, ASK_PUBLISHER)

    def _run(self, *words: str, saw: Callable[[int], None] = lambda _: None) -> tuple[int, str]:
        """Exit status, and the end of what it said on standard error."""
        errors = self.folder / "errors"
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*self._limits(), tool("qemu-img"), *words],
                cwd=self.folder,
                env={"LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            self._watch(process, saw)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        return process.returncode, errors.read_bytes()[-1000:].decode("utf-8", "replace").strip()

    def _limits(self) -> list[str]:
        largest = self.virtual_size + self.virtual_size // 64 + 64 * MiB  # tables, and headers
        cpu = _LEAST_CPU_S + self.virtual_size // _BYTES_PER_CPU_S
        return [tool("prlimit"), f"--as={_MEMORY}", f"--cpu={cpu}", f"--fsize={largest}", "--core=0", "--"]

    def _watch(self, process: subprocess.Popen[bytes], saw: Callable[[int], None]) -> None:
        """Read its progress, ``    (12.34/100%)`` and a carriage return, until it has ended."""
        assert process.stdout is not None
        pipe, done = process.stdout.fileno(), 0
        os.set_blocking(pipe, False)
        while process.poll() is None:
            self.check()
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                percents = _PERCENT.findall(_available(pipe))
                now = int(float(percents[-1]) * self.virtual_size / 100) if percents else done
                saw(now - done)
                done = now


def _available(pipe: int) -> bytes:
    try:
        return os.read(pipe, 64 * 1024)
    except BlockingIOError:
        return b""


def tool(name: str) -> str:
    """The absolute path of a program; ConfigError where it is missing."""
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"{name} is not installed on this worker", name, "Install qemu-utils and util-linux")
    return path


def refuse_source(format_: str, where: str) -> None:
    """Raise UnknownFormat for an image that is no disk to convert."""
    if format_ not in _SOURCES:
        raise UnknownFormat(f"The image is {format_}, which is not converted", where, "Ask without convert_to")
