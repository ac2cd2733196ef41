"""``make bench``: measures speed and memory of our jobs and of the programs that people would use instead.

docs/reference/benchmarks.md has the numbers and the method.
"""

from __future__ import annotations

import argparse
import compileall
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ssvm_worker.units import GiB, KiB, MiB

from . import (
    artifacts,
    backup,
    connections,
    copy,
    decompress,
    download,
    grains,
    inspection,
    ledger,
    memory,
    queue,
    recovery,
    report,
    restore,
    serve,
    upload,
)
from .contest import Broken, Row

_UNITS = {"": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB}
Bench = Callable[[Path, int, int], list[Row]]
#: Each benchmark with its default sizes.
BENCHES: dict[str, tuple[Bench, tuple[int, ...]]] = {
    "download": (download.bench, (2 * GiB,)),
    "connections": (connections.bench, (GiB,)),
    "decompress": (decompress.bench, (2 * GiB,)),
    "upload": (upload.bench, (GiB,)),
    "copy": (copy.bench, (2 * GiB,)),
    "backup": (backup.bench, (GiB,)),
    "restore": (restore.bench, (2 * GiB,)),
    "grains": (grains.bench, (512 * MiB,)),
    "inspection": (inspection.bench, (GiB,)),
    "serve": (serve.bench, (2 * GiB,)),
    "artifacts": (artifacts.bench, (10_000, 100_000)),
    "queue": (queue.bench, (5_000,)),
    "ledger": (ledger.bench, (100_000,)),
    "recovery": (recovery.bench, (50,)),
    "memory": (memory.bench, (GiB, 20 * GiB)),
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
    parser.add_argument("names", nargs="*", metavar="BENCH", help=f"run only {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--size", type=_size, action="append", help="run with this size, such as 64MiB (repeatable)")
    parser.add_argument("--runs", metavar="N", type=int, default=3, help="run each side N times, compare the medians")
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
    if args.write:
        report.keep(results, args.runs)
    return int(any("no" in each.ok for each in rows))


def _run(args: argparse.Namespace) -> dict[str, list[Row]]:
    results: dict[str, list[Row]] = {}
    for name in args.names or BENCHES:
        bench, sizes = BENCHES[name]
        rows = results[name] = []
        for size in args.size or sizes:
            print(f"{name}:", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="ssvm-bench-", dir=_scratch()) as scratch:
                rows += bench(Path(scratch), size, args.runs)
    return results


if __name__ == "__main__":
    sys.exit(main())
