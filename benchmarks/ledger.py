"""A ledger of many jobs: memory of the broker for each record, and its time for a page."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssvm_worker.jobs import find_job
from ssvm_worker.wiring.assembly import new_job

from .contest import Row
from .workers import QueueSetup, queue_setup

_MAX_BYTES = 2048
_MAX_S = 0.050
#: One in this many jobs is queued, and one in this many has failed.
_QUEUED, _FAILED = 10, 20
#: One in this many jobs is in another zone and lane.
_OTHER_ZONE = 1000
_PAGES: dict[str, dict[str, Any]] = {
    "the newest": {},
    "failed ones": {"state": "failed"},
    "of one lane": {"zone": "z", "lane": "download"},
    "queued ones of a lane, the 20th page": {"state": "queued", "lane": "download", "offset": 950},
    "of a zone and a lane with one in a thousand": {"zone": "far", "lane": "upload"},
    "the newest, the 20th page": {"offset": 950},
}


def bench(_: Path, size: int, runs: int) -> list[Row]:
    """Measure a ledger of *size* jobs. Requests, results and errors are as long as real ones."""
    with queue_setup() as setup, setup.broker.with_prefix("").client() as client:
        before = client.info("memory")["used_memory"]
        for number in range(size):
            _fill(setup, number)
            if number % 10_000 == 9_999:
                print(f"  {number + 1:,} jobs", file=sys.stderr, flush=True)
        each = (client.info("memory")["used_memory"] - before) / size
        rows = [_row(f"ledger, memory for one of {size:,} jobs", f"{each:.0f} bytes", "≤ 2 KiB", each <= _MAX_BYTES)]
        for name, asked in _PAGES.items():
            client.config_resetstat()
            for _ in range(runs):
                setup.ledger.page(**asked)
            stats = client.info("commandstats")
            stats.pop("cmdstat_exec", None)  # its time includes that of the other commands
            spent = sum(each["usec"] for each in stats.values()) / 1e6 / runs
            label = f"ledger, a page of {size:,} jobs: {name}"
            rows.append(_row(label, f"{spent * 1000:.1f} ms of the server", "≤ 50 ms", spent <= _MAX_S))
    return rows


def _row(name: str, ours: str, target: str, good: bool) -> Row:
    return Row(name, ours, "", "", target, "yes" if good else "**no**")


def _fill(setup: QueueSetup, number: int) -> None:
    """Create one job and take it through its states."""
    account, digest = f"account{number % 97}", f"sha256:{hashlib.sha256(str(number).encode()).hexdigest()}"
    request = {
        "url": f"https://images.example.com/cloud/bookworm/20261120-{number}/debian-12-genericcloud-amd64.qcow2",
        "checksum": digest,
        "account": account,
        "id": f"template-{number}",
        "name": "Debian 12 (genericcloud)",
        "stores": ["primary", "archive"],
        "callback_url": "https://management.example.com/ssvm/callback",
    }
    new = new_job(setup.settings, find_job("download"), request)
    if number % _OTHER_ZONE == _OTHER_ZONE - 1:
        new = replace(new, zone="far", lane="upload")
    record, _ = setup.ledger.submit(new)
    if number % _QUEUED == 0:
        return
    claim = setup.ledger.claim(record.job_id, "z-0a1b2c@worker17.storage.example.com")
    assert claim
    progress = {"stage": "download", "bytes": 350 << 20, "total": 350 << 20, "rate": 90 << 20, "moved": 350 << 20}
    setup.ledger.beat(claim, progress)
    if number % _FAILED == 1:
        error = {
            "error": "ChecksumMismatch",
            "what": f"The checksum is {digest}, and should be {digest}",
            "where": request["url"],
            "remedy": "Ask the source for the right checksum",
            "retryable": False,
            "message": f"The checksum is {digest}, and should be another [{request['url']}]",
        }
        setup.ledger.finish(claim, "failed", error=error, progress=progress)
        return
    name = "debian-12-genericcloud-amd64.qcow2"
    result = {
        "key": f"template/tmpl/{account}/template-{number}/{name}",
        "size": 350 << 20,
        "virtual_size": 2 << 30,
        "format": "qcow2",
        "digest": digest,
        "objects": [name, "template.properties"],
        "stores": ["primary", "archive"],
        "owed": {},
        "resumptions": 0,
        "reused": False,
    }
    setup.ledger.finish(claim, "succeeded", result=result, progress=progress)
    setup.ledger.note_callback(record.job_id, "delivered")
