"""One download in this process, and the memory it took above the idle process, as JSON.

Idle is: everything imported, the request parsed, the attempt made; no connection and no SDK client yet. The peak is
the kernel's own (VmHWM), set back at that moment, so no sampling misses it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import botocore.session  # noqa: F401 - part of the idle process, as a worker has it
from oslo_utils.imageutils import format_inspector  # noqa: F401 - the same

from ssvm_worker import config
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.sources.http import source as http  # noqa: F401 - the same
from ssvm_worker.stores.s3 import store as s3  # noqa: F401 - the same
from ssvm_worker.wiring.assembly import make_attempt


def _held(field: str) -> int:
    """Bytes, by a line of /proc/self/status (proc(5))."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


def main(settings_file: str, request_json: str) -> None:
    """Run the request."""
    settings = config.load(Path(settings_file))
    job = JOBS["download"]
    request = parse_request(job.Request, json.loads(request_json), job.name)
    attempt = make_attempt(settings, "bench")
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes the present
    idle = _held("VmRSS")
    result = job.run(request, attempt)
    print(json.dumps({"idle": idle, "peak": _held("VmHWM"), "size": result["size"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
