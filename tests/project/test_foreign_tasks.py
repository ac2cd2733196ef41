"""A directory with a foreign ``tasks.py``: the product's commands run in it, and never run that file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssvm_worker.runner.worker_command import flower_command, worker_command
from tests.servers.worker import Site

#: The trace that a foreign file leaves when it is imported.
TRAP = "open({path!r}, 'w').close()\nraise SystemExit('a foreign file was run')\n"
CLIENT = """
import sys
from ssvm_worker.client import Client
with Client.connect(sys.argv[1], zone="z", prefix=sys.argv[2]) as client:
    print(client.submit("delete", job_id="by-client", account="1", id="x").state)
    print(client.cancel("by-client", by="the test").state)
    print(client.retry("by-client", by="the test").state)
"""


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Return a directory with such files."""
    directory = tmp_path / "foreign"
    directory.mkdir()
    for name in ("tasks", "billiard", "flower", "kombu"):
        (directory / f"{name}.py").write_text(TRAP.format(path=str(tmp_path / "sprung")))
    return directory


def run(site: Site, directory: Path, *command: str, **environ: str) -> tuple[int, str]:
    """Run a command in that directory, and return status and text."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SSVM_", "FLOWER_"))}
    given = {"env": clean | {"SSVM_CONFIG": str(site.file)} | environ, "cwd": directory, "capture_output": True}
    done = subprocess.run(command, text=True, **given)
    assert not (directory.parent / "sprung").exists(), done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


SCRIPT, MODULE = [str(Path(sys.executable).parent / "ssvm")], [sys.executable, "-m", "ssvm_worker"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *(
            (SCRIPT, words.split())
            for words in ("reap", "submit delete --account 1 --id x", "jobs", "doctor", "stores")
        ),
        (MODULE, ["submit", "delete", "--account", "1", "--id", "x"]),
    ],
)
def test_commands(site: Site, trap: Path, command: list[str], words: list[str]) -> None:
    """``ssvm`` and ``python -m ssvm_worker`` import nothing from the current directory."""
    status, text = run(site, trap, *command, *words)
    assert status in (0, 1), text
    assert "Traceback" not in text


OURS = [sys.executable, "-P", "-m"]


@pytest.mark.parametrize("what", ["worker", "flower", "beat", "report"])
def test_celery(site: Site, trap: Path, what: str) -> None:
    """The documented commands for workers, beat and Flower import nothing from the current directory."""
    worker, environ = worker_command(site.settings)
    flower, login = flower_command(0, "me:secret")
    own = {"worker": [*worker, "--help"], "flower": [*flower, "--help"]}
    status, text = run(site, trap, *own.get(what, [*OURS, "tasks", what, "--help"]), **environ, **login)
    assert status == 0, text


def test_worker(site: Site, trap: Path) -> None:
    """A worker that starts in such a directory runs jobs."""
    argv, environ = worker_command(site.settings)
    given = {"env": {**os.environ, **environ, "SSVM_CONFIG": str(site.file)}, "cwd": trap}
    log = trap.parent / "worker.log"
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output, **given) as process:
        site.submit("delete", account="1", id="x", job_id="j1")
        site.until(lambda: process.poll() is not None or site.ledger.get("j1").ended, "the job has ended")
        process.terminate()
    assert site.ledger.get("j1").state == "succeeded", log.read_text()
    assert not (trap.parent / "sprung").exists()


def test_client(site: Site, trap: Path) -> None:
    """A management server with its own package ``tasks`` submits, cancels and retries."""
    for name in ("billiard", "flower", "kombu"):
        (trap / f"{name}.py").unlink()  # a server would not run with these either
    status, text = run(site, trap, sys.executable, "-c", CLIENT, site.broker.url, site.broker.prefix)
    assert (status, text.split()) == (0, ["queued", "cancelled", "queued"])
    assert site.waiting("maintenance") == 2


def test_embedded_broker_away(site: Site, tmp_path: Path) -> None:
    """The error of an absent embedded broker says that its worker starts it."""
    environ = {"SSVM_BROKER__URL": "embedded", "SSVM_STATE_DIR": str(tmp_path / "s")}
    status, text = run(site, tmp_path, sys.executable, "-P", "-m", "ssvm_worker", "jobs", **environ)
    assert status == 75
    assert "Start `ssvm worker`" in text
    assert "Check broker.url" not in text
