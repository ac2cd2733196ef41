"""How the cost grows with the work: several downloads at once on one worker, and the memory of an idle worker."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ssvm_worker.units import GiB, MiB, human_size

from .contest import Row, left_out
from .download import Site, found, serving, write_random
from .workers import WarmWorker, memory_of, warm_worker

#: The numbers of jobs at once.
_JOBS = (1, 2, 4, 8)
_MAX_IDLE = 60 * MiB
#: Seconds until an idle worker has done its first background work.
_SETTLE_S = 5.0


def bench(scratch: Path, size: int, _: int) -> list[Row]:
    """Run 1, 2, 4 and 8 downloads of *size* bytes at once, over HTTP into a directory, with SHA-256."""
    if not (nginx := found("nginx")):
        return [left_out("scale", "nginx is not installed")]
    (scratch / "www").mkdir()
    digest = write_random(scratch / "www/image.raw", size)
    rows: list[Row] = []
    with serving(nginx, scratch, "image.raw", digest) as site:
        for count in _JOBS:
            with warm_worker(site.config, count) as worker:
                if count == _JOBS[1]:
                    rows += _idle(worker)
                rows.append(_throughput(site, worker, count, size))
                print(f"  {rows[-1].bench}: {rows[-1].ours}", file=sys.stderr, flush=True)
    return rows


def _throughput(site: Site, worker: WarmWorker, count: int, size: int) -> Row:
    requests = [_request(site, number) for number in range(count)]
    idle = {pid: memory_of(pid, "VmRSS") for pid in worker.pids[1:]}
    worker.run_all("download", [_request(site, 100 + number) for number in range(count)])  # imports the libraries
    _remove(site)
    cost = worker.run_all("download", requests)
    grown = max(memory_of(pid, "VmHWM") - before for pid, before in idle.items())
    _remove(site)
    rate = count * size / cost.wall
    ours = f"{human_size(rate)}/s, {cost.cpu * GiB / (count * size):.2f} s CPU for 1 GiB"
    bench = f"downloads of {human_size(size)} at once: {count}"
    return Row(bench, ours, "", f"{human_size(grown)} above idle each", "", "")


def _request(site: Site, number: int) -> dict[str, str]:
    return {"url": site.plain, "checksum": site.digest, "account": "a", "id": f"i{number}", "format": "raw"}


def _remove(site: Site) -> None:
    for each in (site.root / "store").rglob("*"):
        if each.is_file():
            each.unlink()


def _idle(worker: WarmWorker) -> list[Row]:
    """Measure the worker before its first job. Pss counts shared pages in parts, and Rss counts them in whole."""
    time.sleep(_SETTLE_S)
    rows = []
    for number, pid in enumerate(worker.pids):
        own, resident = (memory_of(pid, field, "smaps_rollup") for field in ("Pss", "Rss"))
        name = f"idle worker, process {number} of the pool" if number else "idle worker, main process"
        ours = f"{human_size(own)} Pss, {human_size(resident)} Rss"
        rows.append(Row(name, ours, "", "", "≤ 60 MiB", "yes" if own <= _MAX_IDLE else "**no**"))
    return rows
