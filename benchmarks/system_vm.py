"""The complete unit of a CloudStack system VM, and Apache, within the memory and CPU of the smallest one.

The kernel enforces the limits: a control group for the memory, its cache of files included, and one CPU. The source and
the simulated server run outside, on the other CPUs. The store is on a disk, because files in /dev/shm are memory that
the kernel cannot reclaim. It needs root, and a hierarchy for memory of version 1 or 2 of control groups.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.demo.ports import free_port
from ssvm_worker.units import MiB, human_size

from .cloudstack import Unit, running
from .contest import Broken, Row, left_out
from .download import found
from .memory import endpoints

#: A system VM has 512 MB. Its kernel, systemd, SSH and logs use about 120 MB.
LIMIT = 512 * MiB - 120 * MiB
#: A directory on a disk (hier(7)).
_DISK = Path("/var/tmp")
_MODULES = Path("/usr/lib/apache2/modules")
_APACHE = """ServerRoot "{place}"
Listen 127.0.0.1:{port}
ServerName 127.0.0.1
PidFile "{place}/apache.pid"
ErrorLog "{place}/error.log"
Mutex file:{place}
User www-data
Group www-data
DocumentRoot "{place}"
"""


@dataclass(frozen=True)
class Group:
    """A control group with a limit of memory."""

    directory: Path
    version: int

    @property
    def command(self) -> Sequence[str]:
        """Return the words before a command that move it into the group, and to one CPU."""
        move = f'echo $$ >"{self.directory}/cgroup.procs" && exec taskset -c {min(os.sched_getaffinity(0))} "$@"'
        return ["/bin/sh", "-c", move, "sh"]

    def number(self, file: str, name: str = "") -> int:
        """Return the number in a file, or in the line of that name."""
        text = (self.directory / file).read_text()
        match = re.search(rf"^{name} ?(\d+)$", text, re.MULTILINE)
        return int(match[1]) if match else 0

    @property
    def peak(self) -> int:
        """Return the highest memory so far, with the cache of files."""
        return self.number("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")

    @property
    def anonymous(self) -> int:
        """Return the memory that the kernel cannot reclaim without swap."""
        return self.number("memory.stat", "anon" if self.version == 2 else "total_rss")

    @property
    def killed(self) -> int:
        """Return how many processes the kernel has killed because of the limit."""
        return self.number("memory.events" if self.version == 2 else "memory.oom_control", "oom_kill")


@contextlib.contextmanager
def limited() -> Iterator[Group]:
    """Make a control group without swap while the block runs. Raise OSError if this machine does not allow it."""
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text()
    first = re.search(r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/(.*)$", own, re.MULTILINE)
    # In version 2, only the root may have processes and groups with limits.
    group = Group((root / "memory" / first[1] if first else root) / f"ssvm-bench-{os.getpid()}", 1 if first else 2)
    if not first:
        (root / "cgroup.subtree_control").write_text("+memory")
    group.directory.mkdir()
    try:
        limits = {"memory.limit_in_bytes": LIMIT, "memory.memsw.limit_in_bytes": LIMIT} if first else {
            "memory.max": LIMIT,
            "memory.swap.max": 0,
        }  # fmt: skip
        for file, value in limits.items():
            (group.directory / file).write_text(str(value))
        yield group
    finally:
        group.directory.rmdir()


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Measure the unit, idle and with two downloads. There is no peer."""
    if not (apache := found("apache2")) or not _MODULES.is_dir():
        return [left_out("system VM", "apache2 is not installed")]
    try:
        with limited() as group:
            place = Path(tempfile.mkdtemp(prefix="ssvm-bench-", dir=_DISK))
            try:
                with _apache(apache, place, group), endpoints() as port, running(place, group.command) as unit:
                    time.sleep(2)  # the processes have imported everything
                    return _rows(unit, group, f"http://127.0.0.1:{port}/made/{size}", size)
            finally:
                shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        return [left_out("system VM", f"no control group for memory is possible: {error}")]


@contextlib.contextmanager
def _apache(program: str, place: Path, group: Group) -> Iterator[None]:
    place.chmod(0o755)
    loaded = [f"LoadModule {name}_module {_MODULES}/mod_{name}.so" for name in ("mpm_event", "authz_core", "dir")]
    file = place / "apache.conf"
    file.write_text(_APACHE.format(place=place, port=free_port()) + "\n".join(loaded))
    with (place / "apache.log").open("wb") as log:
        process = subprocess.Popen([*group.command, program, "-f", str(file), "-DFOREGROUND"], stderr=log)
    try:
        time.sleep(1)
        if process.poll() is not None:
            raise Broken(f"Apache has ended: {(place / 'apache.log').read_text()}")
        yield
    finally:
        process.terminate()
        process.wait(60)


def _rows(unit: Unit, group: Group, url: str, size: int) -> list[Row]:
    title, limit = f"unit and Apache in {human_size(LIMIT)}, one CPU", human_size(LIMIT)
    idle, pss = group.anonymous, unit.memory()
    started, cpu = time.monotonic(), unit.cpu()
    templates = [unit.server.register_template(f"{url}?{number}", "RAW") for number in range(2)]
    highest = 0
    while not all(each.ready for each in templates):
        highest = max(highest, group.anonymous)
        if failed := [each.error for each in templates if each.error]:
            raise Broken("; ".join(failed))
        if group.killed:
            raise Broken(f"the kernel has killed {group.killed} processes of the unit")
        time.sleep(0.1)
    if wrong := [each for each in templates if each.physical_size != size]:
        raise Broken(f"{len(wrong)} templates have another size")
    took, used = time.monotonic() - started, unit.cpu() - cpu
    both = f"two downloads of {human_size(size)}"
    peak = f"peak {human_size(group.peak)} with the cache of files, {group.killed} processes killed"
    ours = f"{human_size(highest)} of anonymous memory"
    return [
        Row(f"{title}, idle", f"{human_size(idle)} of anonymous memory, {human_size(pss)} Pss", "", "", "", ""),
        Row(f"{title}, {both}", ours, peak, "", f"none killed in {limit}", "yes"),
        Row(f"{title}, {both}, time", f"{took:.1f} s ({used:.1f} s CPU)", "", "", "", ""),
    ]
