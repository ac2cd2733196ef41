"""Beat, RedBeat, cron and the workers' reapers together: no job runs twice, and none is forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers.http import Behaviour, HttpServer
from tests.servers.worker import ROOT, Site

pytestmark = pytest.mark.e2e

MiB = 1 << 20
DATA = os.urandom(8 * MiB)
REDBEAT = ("-S", "redbeat.RedBeatScheduler")
Start = Callable[..., Path]


@pytest.fixture
def start(site: Site, request: pytest.FixtureRequest) -> Start:
    """Start a process with the site's settings, and return its log."""

    def run(name: str, *argv: str) -> Path:
        log = site.directory / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SSVM_")}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *argv],
                env=environment | {"SSVM_CONFIG": str(site.file)},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        request.addfinalizer(lambda: (process.kill(), process.wait()))
        return log

    return run


def beat(start: Start, name: str, *options: str) -> Path:
    return start(name, "tasks", "beat", "--loglevel=INFO", "--pidfile=", *options)


def test_one_redbeat_acts(site: Site, start: Start) -> None:
    """If two beats use RedBeat, one sends, the other waits for its lock, and both use only their keys."""
    first = beat(start, "first", *REDBEAT)
    site.until(lambda: b"Sending due task reap" in first.read_bytes(), "the first beat sends")
    second = beat(start, "second", *REDBEAT)
    site.until(lambda: b"beat: Starting" in second.read_bytes(), "the second beat is there")
    sent = first.read_bytes().count(b"Sending due task reap")
    site.until(lambda: first.read_bytes().count(b"Sending due task reap") > sent + 1, "the first goes on")
    assert b"Sending due task" not in second.read_bytes()
    with site.broker.client() as client:
        names = [key for key in client.scan_iter("*redbeat*") if not key.startswith(site.broker.prefix)]
    assert names == []


def test_all_at_once(site: Site, start: Start, http_server: HttpServer) -> None:
    """A killed worker's job runs once more, although two beats, cron and a reaper look for it."""
    first = site.start()
    url = http_server.serve("image.raw", DATA, stall_after=4 * MiB, then=Behaviour(DATA))
    job_id = site.submit("download", url=url, account="1", id="t1", format="raw")
    site.until(lambda: site.stored_bytes() >= 2 * MiB, "the first bytes are stored")
    site.start()
    logs = [beat(start, "plain", f"--schedule={site.directory}/beat"), beat(start, "red", *REDBEAT)]
    site.until(lambda: all(b"Sending due task reap" in each.read_bytes() for each in logs), "both beats send")
    first.kill()
    cron = [start(f"cron{number}", "ssvm_worker", "reap", "--json") for number in range(3)]
    cleanup = [start(f"cleanup{number}", "ssvm_worker", "cleanup", "--older-than", "0") for number in range(2)]

    record = site.wait(job_id)

    assert (record.state, len(record.attempts)) == ("succeeded", 2), record.error
    assert (site.store / "template/tmpl/1/t1/t1.raw").read_bytes() == DATA
    site.until(lambda: all(b"woken" in each.read_bytes() for each in cron), "every cron job has ended")
    assert not any(b"Traceback" in each.read_bytes() for each in (*cron, *cleanup, *logs))
