"""Peak memory of a transfer from HTTP to S3, above the memory of the idle process. No disk is involved."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ssvm_worker.units import GiB, MiB, human_size

from .contest import Broken, Row

_MAX_MEMORY = 64 * MiB
#: Larger transfers run once: they take long, and one run shows growing memory.
_REPEATED = 2 * GiB


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Measure the worst of all runs. There is no peer."""
    worst, idle, started = 0, 0, time.perf_counter()
    runs = runs if size <= _REPEATED else 1
    for _ in range(runs):
        cost = _transfer(scratch, size)
        worst, idle = max(worst, cost["peak"] - cost["idle"]), cost["idle"]
        print(f"  {human_size(cost['idle'])} idle, {human_size(cost['peak'])} at the peak", file=sys.stderr, flush=True)
    rate = runs * size / (time.perf_counter() - started)
    ours = f"{human_size(worst)} above {human_size(idle)} idle"
    ok = "yes" if worst <= _MAX_MEMORY else "**no**"
    return [Row(f"memory, HTTP to S3, {human_size(size)}", ours, "", f"{human_size(rate)}/s", "≤ 64 MiB", ok)]


def _transfer(scratch: Path, size: int) -> dict[str, int]:
    with endpoints() as port:
        config = scratch / "worker.toml"
        config.write_text(
            f'[stores.primary]\nurl = "s3://bench"\nendpoint = "http://127.0.0.1:{port}"\n'
            'access_key = "a"\nsecret_key = "b"\n[download]\nallow_networks = ["127.0.0.0/8"]\n'
        )
        request = {"url": f"http://127.0.0.1:{port}/made/{size}", "account": "a", "id": "image", "format": "raw"}
        command = [sys.executable, "-m", "benchmarks.transfer", str(config), json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise Broken(done.stderr[-3000:])
    cost: dict[str, int] = json.loads(done.stdout)
    if cost["size"] != size:
        raise Broken(f"the transfer stored {cost['size']} bytes instead of {size}")
    return cost


@contextlib.contextmanager
def endpoints() -> Iterator[int]:
    """Run a source and an S3 server while the block runs, and give their port."""
    command = [sys.executable, "-m", "benchmarks.swallow"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as server:
        assert server.stdin
        assert server.stdout
        try:
            yield int(server.stdout.readline())
        finally:
            server.stdin.close()
            server.wait()
