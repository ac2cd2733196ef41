"""Two stories of the demo: a job survives ``kill -9`` of its worker, and a user retries a failed job in Flower."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from typing import Any
from urllib.parse import urlsplit

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import read_draft
from ssvm_worker.config.schema import Settings
from ssvm_worker.jobs.download.image import durable_bytes
from ssvm_worker.ledger.record import Record
from ssvm_worker.units import MiB, human_size
from ssvm_worker.wiring import assembly
from ssvm_worker.wiring.celery_sender import send_wakeup

from .session import READY_S, Demo, follow, submit

#: Slow enough to kill the worker in the middle, fast enough for a demo.
_RATE = 32 * MiB
#: Durable bytes after which the worker is killed.
_KILL_AFTER = 16 * MiB
#: Seconds that a user at a terminal has for the click.
_CLICK_S = 120.0


def kill_and_resume(demo: Demo, settings: Settings, worker: subprocess.Popen[bytes], image: dict[str, Any]) -> None:
    """Kill the worker of a running download, start another one, and let it resume the job."""
    say = demo.say
    say("\na download whose worker is killed:")
    fields = {**image, "account": "2", "id": "202", "name": "resumed template", "max_rate": _RATE}
    job_id = submit(settings, "download", fields)
    store, artifact = assembly.open_store_named(settings, "primary"), Artifact.of_prefix("template/tmpl/2/202")
    with assembly.open_ledger(settings) as ledger:
        while not (record := ledger.get(job_id)).ended:
            demo.show("download 202", record.to_dict()["progress"] or {"stage": record.state, "bytes": 0})
            if (draft := read_draft(store, artifact)) and (kept := durable_bytes(draft)) >= _KILL_AFTER:
                break
            time.sleep(0.1)
        else:
            demo.left_out.append("kill -9: the download ended before its worker could be killed")
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    say(f"killed the worker (kill -9) when {human_size(kept)} were on the disk; starting another one")
    say(f"it resumes the job when the claim of the killed worker expires, after {settings.ledger.claim_s:.0f} s")
    asked = len(demo.web.starts) if demo.web else 0
    demo.start("worker", "--lanes", "download")
    record = follow(demo, settings, "resumed 202", job_id)
    demo.record(record, "resumed")
    first, size = max(demo.web.starts[asked:], default=0) if demo.web else 0, (record.result or {}).get("size", 0)
    say(f"attempt {record.attempted} fetched only the rest, from byte {first:,} of {size:,} on")


def fail_and_retry(demo: Demo, settings: Settings, image: dict[str, Any]) -> None:
    """Let a job fail because its server lacks the image. Then add the image, and let the user click Retry in Flower."""
    say = demo.say
    say("\na download that fails, because its server does not have the image yet:")
    folder, _, name = str(image["url"]).rpartition("/")
    fields = {**image, "url": f"{folder}/late.qcow2", "account": "2", "id": "203", "name": "retried template"}
    job_id = submit(settings, "download", fields)
    record = follow(demo, settings, "download 203", job_id)
    error = record.error or {}
    say(f"job {job_id} {record.state}: {error.get('error')}: {error.get('what')}")
    (demo.scratch / "web" / "late.qcow2").hardlink_to(demo.scratch / "web" / name)
    say("the server has the image now. Retry the job:")
    if demo.flower:
        say(f"  click Retry on {demo.flower.url}/jobs/{job_id}")
        say(f"  log in as {demo.flower.user} with the password {demo.flower.password}")
    else:
        say(f"  ssvm retry {job_id}")
    if demo.keep:
        return
    if demo.flower and demo.interactive:
        _wait_for_click(demo, settings, record)
    with assembly.open_ledger(settings) as ledger:
        if ledger.get(job_id).state == "failed":
            say("there was no click, so the demo retries the job itself")
            send_wakeup(settings, ledger.retry(job_id, "the demo"))
    record = follow(demo, settings, "retried 203", job_id)
    demo.record(record, "retried")
    say(f"retried by {record.attempts[-1].by}")


def _wait_for_click(demo: Demo, settings: Settings, failed: Record) -> None:
    """Wait until a user has retried the job, at most two minutes after Flower has started."""
    assert demo.flower
    deadline = time.monotonic() + READY_S
    while not _answers(demo.flower.url) and time.monotonic() < deadline:
        time.sleep(0.2)
    demo.say(f"waiting {_CLICK_S:.0f} s for the click; then the demo retries the job itself")
    deadline = time.monotonic() + _CLICK_S
    with assembly.open_ledger(settings) as ledger:
        while ledger.get(failed.job_id).state == "failed" and time.monotonic() < deadline:
            time.sleep(0.2)


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), 2).close()
    except OSError:
        return False
    return True
