"""Cron, systemd's timers and beat do the same work at the same times, and do not harm each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cli import main, make_parser
from ssvm_worker.errors import EXIT_RETRYABLE
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob, queue_name
from tests.neighbours import ROOT, missing
from tests.servers.broker import Broker
from tests.waiting import CLAIM_S, PATIENCE_S, until

CONFIG = ROOT / "config"
BIN = "/opt/ssvm-worker/.venv/bin"
Reap = Callable[..., tuple[int, str]]


@pytest.fixture
def ledger(broker: Broker) -> Ledger:
    """Return the ledger of the commands, with short claims."""
    return Ledger(broker.url, prefix=broker.prefix, claim_s=0.4)


@pytest.fixture
def reap(broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Reap:
    """Run ``ssvm reap``, and return its status and output."""
    for name, value in (("BROKER__URL", broker.url), ("BROKER__PREFIX", broker.prefix), ("ZONE", "z")):
        monkeypatch.setenv(f"SSVM_{name}", value)
    for name, value in (("LEDGER__CLAIM_S", "0.4"), ("LEDGER__REAP_S", "0.1"), ("LEDGER__KEEP_DAYS", "0")):
        monkeypatch.setenv(f"SSVM_{name}", value)

    def run(*argv: str) -> tuple[int, str]:
        return main(["reap", *argv]), capsys.readouterr().out

    return run


def messages(broker: Broker) -> int:
    with broker.client() as client:
        return int(client.llen(broker.prefix + queue_name("z", "download")))


def overdue(broker: Broker, job_id: str) -> None:
    with broker.client() as client:
        client.hset(f"{broker.prefix}ssvm.ledger:job:{job_id}", "ready", "0")


def a_job(job_id: str) -> NewJob:
    return NewJob(job_id, "download", "z", "download", {})


def test_reap_is_quiet(reap: Reap) -> None:
    """Without work it prints nothing, and ends with 0."""
    assert reap() == (0, "")
    assert json.loads(reap("--json")[1]) == {"woken": [], "not_woken": [], "callbacks": 0, "records": 0}


def test_reap_rings(reap: Reap, ledger: Ledger, broker: Broker) -> None:
    """A job whose message is lost gets another one, and one line says so."""
    ledger.submit(a_job("j1"))
    overdue(broker, "j1")
    assert reap() == (0, "reap woke workers for 1 job\n")
    assert messages(broker) == 1


def test_reap_alone_finds_the_dead(reap: Reap, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed worker's job is queued again without another reaper, and a live worker's job is not."""
    monkeypatch.setenv("SSVM_LEDGER__CLAIM_S", str(CLAIM_S))  # rounds must follow each other within half of it
    ledger = Ledger(broker.url, prefix=broker.prefix, claim_s=CLAIM_S)
    for name in ("dead", "lives"):
        ledger.submit(a_job(name))
    assert ledger.claim("dead", "w1")
    claim = ledger.claim("lives", "w2")
    assert claim
    with broker.client() as client:  # the broker has just returned, and live workers have not renewed yet
        client.zadd(f"{broker.prefix}ssvm.ledger:claims", {"dead": 1, "lives": 1})
    ledger.beat(claim)
    long_claim = Ledger(broker.url, prefix=broker.prefix, claim_s=PATIENCE_S)
    long_claim.beat(claim)
    assert reap() == (0, "reap woke workers for 1 job\n")
    assert [ledger.get(each).state for each in ("dead", "lives")] == ["queued", "running"]


def test_reap_drops_records(reap: Reap, ledger: Ledger) -> None:
    """Expired records are deleted."""
    for number in range(3):
        ledger.submit(a_job(f"j{number}"))
        ledger.cancel(f"j{number}", "me")
    assert reap() == (0, "reap deleted 3 old records\n")
    assert reap() == (0, "")


def test_reap_without_broker(reap: Reap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a broker it ends with 75, so that a timer's unit fails visibly."""
    monkeypatch.setenv("SSVM_BROKER__URL", "redis://127.0.0.1:1/0")
    assert reap()[0] == EXIT_RETRYABLE


def test_rounds_of_beat_alone(ledger: Ledger, broker: Broker) -> None:
    """Rounds with the interval of a claim find lost jobs too, if the ledger knows the interval."""
    ledger.submit(a_job("j1"))
    assert ledger.claim("j1", "w1")
    ledger.reap(0.4, 5)
    found: list[Any] = []

    def reaped() -> bool:
        with broker.client() as client:  # the last round was a claim's time ago
            seconds, micros = client.time()
            client.hset(f"{broker.prefix}ssvm.ledger:reaper", mapping={"last": seconds + micros / 1e6 - 0.4})
            if not found:
                client.hset(f"{broker.prefix}ssvm.ledger:reaper", "spare", 0)
        found.extend(ledger.reap(0.4, 5))
        return bool(found)

    until(reaped, "the lost job is found")


def test_timers_are_valid(tmp_path: Path) -> None:
    """systemd accepts every unit unchanged, once the worker is installed at the units' paths."""
    if not shutil.which("systemd-analyze"):
        missing("systemd-analyze", "install systemd")
    for unit in filter(Path.is_file, (CONFIG / "systemd").iterdir()):
        text = unit.read_text().replace(BIN, str(Path(sys.executable).parent))
        (tmp_path / unit.name.replace("@.", "@z.")).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    for folder in filter(Path.is_dir, (CONFIG / "systemd").iterdir()):
        shutil.copytree(folder, tmp_path / folder.name.replace("@.", "@z."))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_of_the_units() -> None:
    """The command line accepts the command of each unit."""
    commands = [
        words.split()
        for unit in (CONFIG / "systemd").glob("*.service")
        for words in re.findall(rf"^ExecStart=.*{BIN}/ssvm (.+)", unit.read_text(), re.MULTILINE)
    ]
    assert len(commands) == 8
    for words in commands:
        make_parser().parse_args(words)


@pytest.mark.parametrize("name", ["cleanup", "reap"])
def test_cron_and_timers_agree(name: str) -> None:
    """Cron and systemd use the same command and lock, so a machine with both runs it once."""
    cron = next(line for line in (CONFIG / "crontab").read_text().splitlines() if f"ssvm {name}" in line)
    service = (CONFIG / f"systemd/ssvm-{name}.service").read_text()
    command = re.search(r"ExecStart=/usr/bin/(.+)", service)
    assert command
    assert cron.split("ssvm  ", 1)[1] == command[1]


def test_lock_of_cron(tmp_path: Path) -> None:
    """A second start during the first one ends at once with 0 and does nothing."""
    lock = str(tmp_path / "lock")
    with subprocess.Popen(["flock", "-n", "-E", "0", lock, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as it:
        assert it.stdin
        assert it.stdout
        it.stdin.write(b"!")
        it.stdin.flush()
        it.stdout.read(1)
        again = subprocess.run(["flock", "-n", "-E", "0", lock, "echo", "twice"], capture_output=True)
        it.stdin.close()
    assert (again.returncode, again.stdout) == (0, b"")
