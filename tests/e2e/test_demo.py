"""The demo as a process: everything that it starts ends with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.servers.http import HttpServer
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.e2e


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Return a directory for temporary files; tmp_path is too long for a unix socket."""
    directory = Path(tempfile.mkdtemp(prefix="ssvm-t-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def users(directory: Path) -> list[int]:
    """Return the processes that have this directory in their environment or command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            text = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if str(directory).encode() in text:
                found.append(int(process.name))
    return found


def test_sigterm(scratch: Path, http_server: HttpServer) -> None:
    """A demo that is ended by SIGTERM leaves no process and no file."""
    url = http_server.serve("slow.raw", bytes(4 << 20), stall_after=1 << 16)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
    command = [sys.executable, "-P", "-m", "ssvm_worker", "demo", "--url", url]
    log = scratch.with_suffix(".log")
    with log.open("wb") as said:
        demo = subprocess.Popen(command, env=environ | {"TMPDIR": str(scratch)}, stdout=said, stderr=said)
    until(lambda: bool(http_server.requests) or demo.poll() is not None, "the demo's worker reads")
    assert demo.poll() is None, log.read_text()
    demo.send_signal(signal.SIGTERM)
    assert demo.wait(PATIENCE_S) == 128 + signal.SIGTERM
    until(lambda: users(scratch) == [], "no process is left")
    assert list(scratch.iterdir()) == []
    log.unlink()


def test_stories(scratch: Path) -> None:
    """Without a terminal, one job outlives its killed worker, another is retried, and all files are removed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
    command = [sys.executable, "-P", "-m", "ssvm_worker", "demo"]
    environ["TMPDIR"] = str(scratch)
    done = subprocess.run(
        command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=3 * PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = (
        r"killed the worker \(kill -9\)",
        r"attempt \d+ fetched only the rest, from byte [\d,]{9,} of",
        r"job \S+ failed: SourceNotFound",
        r"click Retry on http://127\.0\.0\.1:\d+/jobs/demo-",
        r"log in as demo with the password \S+",
        r"retried by the demo",
        r"resumed +256 MiB at",
        r"/ssvm-demo-\w+ has all files .* removed",
    )
    found = [re.search(each, done.stdout) for each in steps]
    assert all(found), done.stdout
    until(lambda: users(scratch) == [], "no process is left")
    assert list(scratch.iterdir()) == []


def test_cloudstack(scratch: Path) -> None:
    """A simulated management server brings the agent Up, registers and links a template, and deletes both."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
    command = [sys.executable, "-P", "-m", "ssvm_worker", "demo", "--cloudstack", "--json"]
    environ["TMPDIR"] = str(scratch)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    template = json.loads(done.stdout)["template"]
    assert template["installPath"] == "template/tmpl/1/201/201.qcow2"
    assert "request=PURGE" in done.stderr  # at the same time as the link
    steps = ("is Up", "registers template", "gets the link", "has downloaded", "→ Delete: ")
    lines = done.stderr.splitlines()
    numbers = [next((at for at, line in enumerate(lines) if each in line), -1) for each in steps]
    assert numbers == sorted(numbers), done.stderr
    assert -1 not in numbers, done.stderr
    assert len(lines) <= 40, done.stderr
    until(lambda: users(scratch) == [], "no process is left")
    assert list(scratch.iterdir()) == []
