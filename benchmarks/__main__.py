"""``make bench``: measures speed and memory of our jobs and of the programs that people would use instead.

docs/reference/benchmarks.md has the numbers and the method.
"""

from __future__ import annotations

import argparse
import compileall
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ssvm_worker.units import GiB, KiB, MiB

from . import (
    artifacts,
    backup,
    cloudstack,
    connections,
    copy,
    decompress,
    download,
    download_s3,
    grains,
    inspection,
    ledger,
    memory,
    queue,
    recovery,
    report,
    restore,
    scale,
    serve,
    system_vm,
    upload,
)
from .contest import Broken, Row

_UNITS = {"": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB}
#: The divisor of the sizes with --quick.
_QUICK = 64
Bench = Callable[[Path, int, int], list[Row]]


class _Plan(NamedTuple):
    """How a benchmark runs without options. The plans of all benchmarks take at most 25 minutes on two cores."""

    bench: Bench
    sizes: tuple[int, ...]
    runs: int = 3
    #: Run it only by its name, because it takes long.
    by_name: bool = False


BENCHES = {
    "download": _Plan(download.bench, (2 * GiB,), 5),
    "download_s3": _Plan(download_s3.bench, (GiB,)),
    "connections": _Plan(connections.bench, (256 * MiB,), 1),
    "decompress": _Plan(decompress.bench, (256 * MiB,), 1),
    "upload": _Plan(upload.bench, (GiB,)),
    "copy": _Plan(copy.bench, (GiB,), 1),
    "backup": _Plan(backup.bench, (GiB,)),
    "restore": _Plan(restore.bench, (2 * GiB,)),
    "scale": _Plan(scale.bench, (512 * MiB,), 1),
    "grains": _Plan(grains.bench, (512 * MiB,)),
    "inspection": _Plan(inspection.bench, (GiB,)),
    "serve": _Plan(serve.bench, (2 * GiB,)),
    "artifacts": _Plan(artifacts.bench, (100_000,), 1),
    "queue": _Plan(queue.bench, (5_000,), 1),
    "ledger": _Plan(ledger.bench, (100_000,), 1),
    "cloudstack": _Plan(cloudstack.bench, (2 * GiB,)),
    "system_vm": _Plan(system_vm.bench, (2 * GiB,), 1),
    "memory": _Plan(memory.bench, (GiB, 20 * GiB), 1),
    "recovery": _Plan(recovery.bench, (50,), 1, by_name=True),
}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+) ?(|KiB|MiB|GiB)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give a number such as 64MiB")
    return int(match[1]) * _UNITS[match[2]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure our jobs and other programs side by side."
    )
    slow = ", ".join(name for name, plan in BENCHES.items() if plan.by_name)
    parser.add_argument(
        "names", nargs="*", metavar="BENCH", help=f"run only {', '.join(BENCHES)} (default: all but {slow})"
    )
    parser.add_argument("--quick", action="store_true", help=f"check all quickly, with a {_QUICK}th of each size")
    parser.add_argument("--size", type=_size, action="append", help="run with this size, such as 64MiB (repeatable)")
    parser.add_argument(
        "--runs", metavar="N", type=int, help="run each side N times, compare the medians (default: 1 or 3)"
    )
    parser.add_argument("--write", action="store_true", help="write the tables to docs/reference/benchmarks.md")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; choose from {', '.join(BENCHES)}")
    return args


def _scratch() -> str | None:
    """Return a directory in memory if there is one. On a disk, the benchmarks would measure only the disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> int:
    """Run the benchmarks and print the table. Return 1 if a target was missed, 2 if a contender failed."""
    args = _arguments()
    # Compile as an installation does. An edited checkout may have no bytecode, or may not write it.
    for package in ("ssvm_worker", "tasks"):
        compileall.compile_dir(package, quiet=1)
    try:
        results = _run(args)
    except Broken as error:
        print(error, file=sys.stderr)
        return 2
    rows = [each for found in results.values() for each in found]
    print(report.table(rows))
    if missed := [f"{each.bench} ({each.target}: {each.ratio or each.ours})" for each in rows if "no" in each.ok]:
        print(f"missed targets: {'; '.join(missed)}")
    if args.write:
        report.keep(results, {name: args.runs or plan.runs for name, plan in BENCHES.items()})
    return int(bool(missed))


def _run(args: argparse.Namespace) -> dict[str, list[Row]]:
    """Return the rows of each section."""
    results: dict[str, list[Row]] = {}
    for name in args.names or [each for each, plan in BENCHES.items() if not plan.by_name]:
        plan, started = BENCHES[name], time.monotonic()
        quick = [max(1, size // _QUICK) for size in plan.sizes] if args.quick else []
        runs = args.runs or (1 if args.quick else plan.runs)
        for size in args.size or quick or plan.sizes:
            print(f"{name}:", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="ssvm-bench-", dir=_scratch()) as scratch:
                for row in plan.bench(Path(scratch), size, runs):
                    results.setdefault(row.section or name, []).append(row)
        print(f"{name} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
