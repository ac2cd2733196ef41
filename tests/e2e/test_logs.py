"""A worker and `ssvm run` can log for machines, and every line about a job names the job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import images
from tests.servers.http import HttpServer
from tests.servers.syslog import Syslog
from tests.servers.worker import Site, until

pytestmark = pytest.mark.e2e
DISK = images.mbr(1 << 20)


@pytest.fixture
def site(make_site: Callable[..., Site], tmp_path: Path, syslog: Syslog) -> Site:
    """Return a site that logs JSON, with a second store that is absent."""
    away = {"url": f"file://{tmp_path}/away"}
    return make_site(log={"format": "json", "syslog": syslog.url}, stores={"archive": away})


def objects(text: str) -> list[dict[str, Any]]:
    """Return all lines except Celery's banner."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_worker(site: Site, http_server: HttpServer, syslog: Syslog) -> None:
    """Lines of the main process and the pool, also Celery's, have the job's id; syslog gets the same."""
    worker = site.start()
    url = http_server.serve("image", DISK)
    fields = {"url": url, "account": "2", "format": "raw", "stores": ["primary", "archive"]}
    ours = site.submit("download", job_id="ours", id="1", **fields)
    assert site.wait(ours).state == "succeeded"
    site.send("download", {"job_id": "theirs", "id": "2", **fields, "stores": ["primary"]}, task_id="a-message")
    assert site.wait("theirs").state == "succeeded"

    def told() -> list[dict[str, Any]]:
        return objects(worker.log.read_text())

    ends = re.compile(r"Task ssvm\.download\[.*\] succeeded in")  # not those of the copy that is owed
    until(lambda: sum(bool(ends.match(each["message"])) for each in told()) == 2, "Celery has told of both")
    for each in told():
        about = [job_id for job_id in ("ours", "theirs") if job_id in each["message"]]
        assert not about or each["job_id"].startswith(about[0]), each
    said = {job_id: [each for each in told() if each.get("job_id") == job_id] for job_id in ("ours", "theirs")}
    owed = next(each for each in said["ours"] if "is owed" in each["message"])
    assert (owed["logger"], owed["level"], owed["attempt"]) == ("ssvm.job", "warning", 1)
    assert {each["process"] for each in said["ours"]} == {"MainProcess", "ForkPoolWorker-1"}
    assert any(each["logger"] == "celery.app.trace" for each in said["theirs"])
    until(lambda: any("is owed" in text for _, text in syslog.lines), "syslog has heard of it")
    assert all(json.loads(text) for _, text in syslog.lines)


def test_in_the_foreground(site: Site, http_server: HttpServer, syslog: Syslog) -> None:
    """`ssvm run` names the job too, with warnings on the terminal and all lines in syslog."""
    words = ["run", "download", "--url", http_server.serve("image", DISK), "--account", "2", "--id", "1"]
    words += ["--job-id", "by-hand", "--stores", "primary,archive", "--config", str(site.file)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
    done = subprocess.run([sys.executable, "-m", "ssvm_worker", *words], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    [owed] = objects(done.stderr)
    assert (owed["job_id"], owed["level"]) == ("by-hand", "warning")
    until(lambda: any("by-hand" in text for _, text in syslog.lines), "syslog has heard of it")
