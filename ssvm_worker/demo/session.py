"""The state of a running demo, its processes, and its jobs."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssvm_worker import config
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import SourceUnavailable
from ssvm_worker.jobs import JOBS
from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring import assembly

from .web import Web

#: Seconds that a process gets to start.
READY_S = 180.0


#: Prints a line.
Say = Callable[[str], None]
#: Shows a progress record of a running job, by its label.
Show = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class FlowerLogin:
    """The address of the demo's Flower, and its login."""

    url: str
    user: str
    password: str


@dataclass
class Demo:
    """The state of a running demo."""

    scratch: Path
    say: Say
    show: Show
    stack: ExitStack
    #: Keep everything running until Ctrl-C.
    keep: bool = False
    #: A user at a terminal can click.
    interactive: bool = False
    flower: FlowerLogin | None = None
    #: Serves the demo's image.
    web: Web | None = None
    settings: list[str] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def config_file(self) -> Path:
        """Return the path of the worker's settings."""
        return self.scratch / "worker.toml"

    def write_settings(self) -> Settings:
        """Write worker.toml and return the settings in it."""
        self.config_file.write_text("\n".join(self.settings) + "\n")
        return config.load(self.config_file, environ={})

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``ssvm`` with these arguments and the demo's settings. The process ends with the demo."""
        log = self.stack.enter_context((self.scratch / f"{arguments[0]}.log").open("ab"))
        # Temporary files of a killed worker are in the demo's directory, which is removed.
        environ = {**os.environ, "SSVM_CONFIG": str(self.config_file), "TMPDIR": str(self.scratch)}
        command = [sys.executable, "-P", "-m", "ssvm_worker", *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
        self.stack.callback(stop_process, process)
        return process

    def record(self, record: Record, name: str) -> None:
        """Note the result of a job for the summary. Raise SourceUnavailable if the job did not succeed."""
        if record.state != "succeeded":
            error = record.error or {}
            raise SourceUnavailable(f"The demo's job {record.state}: {error.get('message')}", record.job_id)
        result = record.result or {}
        self.results[name] = result | {"rate": result.get("size", 0) / max(record.updated - record.created, 0.001)}

    def failure(self, command: str) -> SourceUnavailable:
        """Return the error that ``ssvm`` *command* did not start, with the end of its log."""
        tail = (self.scratch / f"{command}.log").read_text(errors="replace").strip().splitlines()[-5:]
        what = f"`ssvm {command}` did not start: " + " / ".join(tail)
        return SourceUnavailable(what, f"ssvm {command}", "Run `ssvm doctor`")


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to stop, wait up to 20 seconds, then kill its process group."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def submit(settings: Settings, name: str, fields: dict[str, Any]) -> str:
    """Queue a job, and return its id."""
    from ssvm_worker.wiring.celery_sender import send_wakeup

    new = assembly.new_job(settings, JOBS[name], fields, default_id=f"demo-{name}-{secrets.token_hex(3)}")
    with assembly.open_ledger(settings) as ledger:
        send_wakeup(settings, ledger.submit(new)[0])
    return new.job_id


def follow(demo: Demo, settings: Settings, label: str, job_id: str) -> Record:
    """Show the progress of a job, and return its record when it has ended."""
    with assembly.open_ledger(settings) as ledger:
        while not (record := ledger.get(job_id)).ended:
            demo.show(label, record.to_dict()["progress"] or {"stage": record.state, "bytes": 0})
            time.sleep(0.2)
    demo.show(label, (record.to_dict()["progress"] or {"bytes": 0}) | {"stage": record.state})
    return record
