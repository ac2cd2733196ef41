"""The complete unit of a CloudStack system VM with a simulated server: memory, time to Up, answers, and a template.

The unit is what deployment A starts: a worker with an embedded broker, the agent and the HTTP service. The server is in
the process of the benchmark, so its own work is part of each measured answer.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.config import load
from ssvm_worker.config.schema import Settings
from ssvm_worker.demo.cloudstack.downloads import DownloadListener
from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from ssvm_worker.demo.cloudstack.wire import WireFrame
from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.record import QUEUED, RUNNING
from ssvm_worker.units import MiB, human_size
from ssvm_worker.wiring.assembly import open_ledger

from .contest import Broken, Row, run
from .memory import endpoints
from .workers import memory_of, wait

_PLACE = "nfs://192.0.2.10/export/sec1"
#: MemoryMax of ssvm.slice in config/cloudstack.
_MAX_MEMORY = 360 * MiB
#: Seconds for which the CPU time of the idle unit is measured.
_IDLE_S = 10.0
_COMMANDS, _BURSTS, _MAX_ANSWER_S, _MIN_RATIO = 100, 5, 0.05, 0.95


@dataclass
class Unit:
    """A server, and the processes that it uses."""

    server: ManagementServer
    settings: Settings
    store: Path
    processes: list[subprocess.Popen[bytes]]
    up_s: float = 0.0
    #: Words before the command of each process.
    before: Sequence[str] = ()

    def memory(self) -> int:
        """Return the memory of all processes. Shared pages are divided between them (Pss, proc(5))."""
        return sum(memory_of(pid, "Pss", "smaps_rollup") for pid in self._pids())

    def cpu(self) -> float:
        """Return the CPU time of all processes in seconds, with that of ended ones."""
        ticks = 0
        for pid in self._pids():
            # utime, stime, cutime, cstime (proc(5)), behind the name, which may have blanks.
            with suppress(OSError):
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def _pids(self) -> Iterator[int]:
        waiting = [each.pid for each in self.processes]
        while waiting:
            pid = waiting.pop()
            with suppress(OSError):
                waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                yield pid

    def clear(self) -> None:
        """Delete all templates, so that the next run starts equal."""
        for entity in list(self.server.zone.entities.values()):
            self.server.delete(entity)


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Measure the unit. The peer of the template is `ssvm run download`."""
    with endpoints() as port, running(scratch) as unit:
        source = f"http://127.0.0.1:{port}/made"
        time.sleep(2)  # the processes have imported everything
        idle, cpu = unit.memory(), unit.cpu()
        time.sleep(_IDLE_S)
        share = (unit.cpu() - cpu) / _IDLE_S
        rows = [
            Row("agent, start to Up", f"{unit.up_s:.2f} s", "", "", "", ""),
            _memory_row("unit idle, memory (Pss)", idle),
            Row("unit idle, CPU", f"{share:.1%} of a core", "", "", "", ""),
            _template(unit, f"{source}/{size}", size, runs),
            *_two_downloads(unit, f"{source}/{size}", f"unit with two downloads of {human_size(size)}"),
            _answers(unit, f"{source}/{MiB}"),
        ]
        if unit.server.zone.problems:
            raise Broken("; ".join(unit.server.zone.problems))
        return rows


@contextmanager
def running(scratch: Path, before: Sequence[str] = ()) -> Iterator[Unit]:
    """Run the processes of a system VM with a server while the block runs. *before*: words before each command."""
    directory = Path(tempfile.mkdtemp(prefix="ssvm-bench-"))  # a socket has a short path
    (scratch / "store").mkdir()
    with make_management_server(directory / "ca", times=ServerTimes(poll=0.1)) as server:
        server.strict = True
        issued = server.authority.issue("127.0.0.1")
        server.zone.add_store(_PLACE)
        server.zone.add_system_vm("s-1-VM", "192.0.2.77")
        file = directory / "worker.toml"
        file.write_text(
            f'zone = "z"\nstate_dir = "{directory / "state"}"\n[broker]\nurl = "embedded"\n[worker]\nconcurrency = 2\n'
            f'[stores.primary]\nurl = "file://{scratch / "store"}"\n[serve]\ncloudstack = true\nmax_connections = 64\n'
            '[download]\nconnections = 2\nallow_networks = ["127.0.0.0/8"]\n'
            f'[cloudstack]\nservers = ["{server.host}"]\nport = {server.port}\nname = "s-1-VM"\nzone = "1"\n'
            f'ca_file = "{issued.ca}"\ncertificate_file = "{issued.certificate}"\nkey_file = "{issued.key}"\n'
            f'[cloudstack.stores]\n"{_PLACE}" = "primary"\n'
        )
        unit = Unit(server, load(file, {}), scratch / "store", [], before=before)
        try:
            _start(unit, file, ["worker"])
            wait(lambda: _answers_now(unit.settings), "the broker answers", 0.1)
            _start(unit, file, ["serve", "--listen", "127.0.0.1:0"])
            started = time.monotonic()
            _start(unit, file, ["agent"])
            server.wait_up()
            unit.up_s = time.monotonic() - started
            yield unit
        finally:
            for process in reversed(unit.processes):
                process.terminate()
                process.wait(60)
            shutil.rmtree(directory, ignore_errors=True)


def _start(unit: Unit, file: Path, arguments: Sequence[str]) -> None:
    log = (file.parent / f"{arguments[0]}.log").open("wb")
    command = [*unit.before, sys.executable, "-m", "ssvm_worker", *arguments]
    environ = os.environ | {"SSVM_CONFIG": str(file)}
    unit.processes.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))


def _answers_now(settings: Settings) -> bool:
    with suppress(WorkerError), open_ledger(settings) as ledger:
        ledger.counts()
        return True
    return False


def _template(unit: Unit, url: str, size: int, runs: int) -> Row:
    """Compare a template from its registration until it is ready with the same download as a command."""
    ours, direct = [], []
    target = unit.store / "direct.toml"
    target.write_text(
        f'[stores.primary]\nurl = "file://{unit.store}"\n'
        '[download]\nconnections = 2\nallow_networks = ["127.0.0.0/8"]\n'
    )
    command = [sys.executable, "-m", "ssvm_worker", "run", "download", "--config", str(target), "--url", url]
    for number in range(runs):
        started = time.monotonic()
        template = unit.server.register_template(url, "RAW", description=f"run {number}")
        unit.server.wait(lambda each=template: each.ready or each.error, "the template is ready", 3600)  # type: ignore[misc]
        if not template.ready or template.physical_size != size:
            raise Broken(f"the template has {template.physical_size} bytes: {template.error}")
        ours.append(time.monotonic() - started)
        unit.clear()
        artifact = ["--account", "9", "--id", f"direct{number}", "--format", "raw"]
        direct.append(run([*command, *artifact]).wall)
        shutil.rmtree(unit.store / "template/tmpl/9")
    target.unlink()
    median, peer = statistics.median(ours), statistics.median(direct)
    ok = "yes" if peer / median >= _MIN_RATIO else "**no**"
    title = f"template of {human_size(size)}, registered to ready"
    ratio = f"{peer / median:.2f}"
    return Row(title, f"{median:.2f} s", f"ssvm run: {peer:.2f} s", ratio, f"≥ {_MIN_RATIO}", ok)


def _two_downloads(unit: Unit, url: str, title: str) -> list[Row]:
    """Return the highest memory during two concurrent downloads, and their CPU time."""
    before = unit.cpu()
    templates = [unit.server.register_template(f"{url}?{number}", "RAW") for number in range(2)]
    highest = 0
    while not all(each.ready for each in templates):
        highest = max(highest, unit.memory())
        if failed := [each.error for each in templates if each.error]:
            raise Broken("; ".join(failed))
        time.sleep(0.05)
    used = unit.cpu() - before
    unit.clear()
    return [_memory_row(title, highest), Row(f"{title}, CPU", f"{used:.1f} s", "", "", "", "")]


def _memory_row(title: str, used: int) -> Row:
    ok = "yes" if used <= _MAX_MEMORY else "**no**"
    return Row(title, human_size(used), "", "", f"≤ {human_size(_MAX_MEMORY)}", ok)


def _answers(unit: Unit, url: str) -> Row:
    """Send many DownloadCommands at once, several times, and return the row with the medians and the range."""
    found = []
    for burst in range(_BURSTS):
        found.append(_burst(unit, f"{url}?burst{burst}"))
        wait(lambda: _has_ended(unit.settings), "all downloads have ended")
        unit.clear()
    middle, last = [statistics.median(each) for each in zip(*found, strict=True)]
    lasts = [each for _, each in found]
    ours = f"p50 {middle * 1000:.0f} ms, p99 {last * 1000:.0f} ms"
    ratio = f"p99 {min(lasts) * 1000:.0f}–{max(lasts) * 1000:.0f} ms"
    ok = "yes" if last <= _MAX_ANSWER_S else "**no**"
    title = f"DownloadCommand, {_COMMANDS} at once, {_BURSTS} times"
    return Row(title, ours, "", ratio, f"p99 ≤ {_MAX_ANSWER_S * 1000:.0f} ms", ok)


def _has_ended(settings: Settings) -> bool:
    with open_ledger(settings) as ledger:
        counts = ledger.counts()
    return not counts[QUEUED] + counts[RUNNING]


def _burst(unit: Unit, url: str) -> tuple[float, float]:
    """Send DownloadCommands of different templates at once. Return the median and the 99th percentile in seconds.

    One thread sends them, and another reads the answers. With a thread for each command, the server in this process
    would need as much CPU time as the agent.
    """
    connection, store = unit.server.connection(), unit.server.zone.stores[0]
    entities = [unit.server.zone.add_entity("TEMPLATE", f"{url}?{each}", "RAW", store) for each in range(_COMMANDS)]
    fields = [DownloadListener(unit.server, connection, each).fields for each in entities]
    frames = [connection.frame_of("DownloadCommand", each) for each in fields]
    sent: dict[int, float] = {}
    answered: dict[int, float] = {}
    complete = threading.Event()

    def note(side: str, frame: WireFrame) -> None:
        if side == "agent" and frame.name == "DownloadAnswer":
            answered[frame.sequence] = time.monotonic()
            if len(answered) == _COMMANDS:
                complete.set()

    unit.server.taps.append(note)
    for frame in frames:
        sent[frame.sequence] = time.monotonic()
        connection.transmit(frame)
    if not complete.wait(60):
        raise Broken(f"{_COMMANDS - len(answered)} DownloadCommands have no answer")
    unit.server.taps.remove(note)
    times = sorted(answered[sequence] - started for sequence, started in sent.items())
    return times[_COMMANDS // 2], times[_COMMANDS * 99 // 100 - 1]
