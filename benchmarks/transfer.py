"""Runs one download in this process and prints its memory as JSON: when idle, and at the peak.

Idle means: all modules imported, the request parsed, the attempt created, no connection and no SDK client yet. The
peak is the kernel's VmHWM, which is reset at that moment. So no sampling can miss the peak.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import boto3  # noqa: F401 - part of the idle process, as in a worker
from oslo_utils.imageutils import format_inspector  # noqa: F401 - see above

from ssvm_worker import config
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.sources.http import source as http  # noqa: F401 - see above
from ssvm_worker.stores.s3 import store as s3  # noqa: F401 - see above
from ssvm_worker.wiring.assembly import make_attempt


def _memory(field: str) -> int:
    """Return the bytes of a line of /proc/self/status (proc(5))."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


def main(settings_file: str, request_json: str) -> None:
    """Run the request."""
    settings = config.load(Path(settings_file))
    job = JOBS["download"]
    request = parse_request(job.Request, json.loads(request_json), job.name)
    attempt = make_attempt(settings, "bench")
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the peak to the current value
    idle = _memory("VmRSS")
    result = job.run(request, attempt)
    print(json.dumps({"idle": idle, "peak": _memory("VmHWM"), "size": result["size"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
