"""When the worker gives up a job that hangs in a store, by a clock that the tests set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ssvm_worker.runner.hung_store import HungStoreWatchdog, kill_if_hung
from tests.servers.worker import Site


def test_gives_up() -> None:
    """A job that does not progress on an absent store is given up after exactly its time."""
    watch = HungStoreWatchdog(60)
    assert not watch.hangs(100, "away", None, stop_requested=False)
    assert not watch.hangs(159, "away", None, stop_requested=False)
    assert watch.hangs(160, "away", None, stop_requested=False)


def test_store_that_answers_again() -> None:
    """The time starts again with each outage."""
    watch = HungStoreWatchdog(60)
    assert not watch.hangs(100, "away", None, stop_requested=False)
    assert not watch.hangs(159, None, None, stop_requested=False)
    assert not watch.hangs(161, "away", None, stop_requested=False)
    assert not watch.hangs(220, "away", None, stop_requested=False)
    assert watch.hangs(221, "away", None, stop_requested=False)


def test_job_that_moves() -> None:
    """A job that moves bytes does not hang, even if another of its stores is absent."""
    watch = HungStoreWatchdog(60)
    assert not any(watch.hangs(100 + 30 * n, "away", {"bytes": n}, stop_requested=False) for n in range(10))


def test_job_that_was_told() -> None:
    """A cancelled job, or one whose worker ends, is given up soon."""
    watch = HungStoreWatchdog(60)
    assert not watch.hangs(100, "away", None, stop_requested=True)
    assert watch.hangs(105, "away", None, stop_requested=True)


#: A pool process whose job hangs in an uninterruptible call. A pipe replaces a mount.
HANGING = """
import sys
from ssvm_worker.config import load
from ssvm_worker.operations.mounts import nfs_mounts
from ssvm_worker.runner.heartbeat import ClaimHeartbeat
from ssvm_worker.runner.hung_store import kill_if_hung
from ssvm_worker.wiring.assembly import open_ledger

settings = load()
[mounted] = nfs_mounts(settings)
mounted._enter()
mounted.health.fail("no answer")
with open_ledger(settings) as ledger:
    claim = ledger.claim(sys.argv[1], "worker")
    with ClaimHeartbeat(ledger, claim) as heart, kill_if_hung(settings, ledger, claim, heart):
        open(sys.argv[2]).read()
"""


def test_process_is_freed(make_site: Callable[..., Site], tmp_path: Path) -> None:
    """The worker kills a process that hangs in its store, and queues the job again without a counted attempt."""
    site = make_site(stores={"primary": {"url": "nfs://10.0.0.5/export"}}, nfs={"give_up_s": 0.1})
    job_id = site.submit("download", url="http://127.0.0.1:9/x", account="1", id="t1")
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", HANGING, job_id, str(tmp_path / "pipe")]
    done = subprocess.run(command, env=os.environ | {"SSVM_CONFIG": str(site.file)}, check=False)
    assert done.returncode == -signal.SIGKILL
    record = site.ledger.get(job_id)
    assert (record.state, record.tries) == ("queued", 0)
    error = record.attempts[0].error
    assert error
    assert error["error"] == "StoreAway"
    assert "no answer" in error["message"]


def test_other_jobs_are_left_alone(make_site: Callable[..., Site]) -> None:
    """Without NFS stores the worker watches no process."""
    site = make_site()
    with kill_if_hung(site.settings, site.ledger, None, None):  # type: ignore[arg-type]
        assert "hung_store" not in {each.name for each in threading.enumerate()}
