"""``make bench``: how fast, and in how much memory, next to what people would use instead.

The numbers are kept in docs/benchmarks.md, which also says how they are made.
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
#: Each with the sizes at which it runs unless ``--size`` says otherwise.
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
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 64MiB or the like")
    return int(match[1]) * _UNITS[match[2]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare with the peers, side by side.")
    parser.add_argument("names", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)}; all of them if none")
    parser.add_argument("--size", type=_size, action="append", help="bytes, as 64MiB; may be repeated")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; the medians are compared")
    parser.add_argument("--write", action="store_true", help="keep the tables in docs/benchmarks.md")
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHES):
        parser.error(f"no such bench: {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    return given


def _scratch() -> str | None:
    """Memory, where there is some: a disk would be all that is measured."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> int:
    """Run, print the table; 1 when a target was missed, 2 when there is nothing to compare."""
    given = _arguments()
    # An installation has its bytecode; a checkout that was edited may have none, or may be forbidden to keep it.
    for package in ("ssvm_worker", "tasks"):
        compileall.compile_dir(package, quiet=1)
    try:
        results = _run(given)
    except Broken as error:
        print(error, file=sys.stderr)
        return 2
    rows = [each for found in results.values() for each in found]
    print(report.table(rows))
    if given.write:
        report.keep(results, given.runs)
    return int(any("no" in each.ok for each in rows))


def _run(given: argparse.Namespace) -> dict[str, list[Row]]:
    results: dict[str, list[Row]] = {}
    for name in given.names or BENCHES:
        bench, sizes = BENCHES[name]
        rows = results[name] = []
        for size in given.size or sizes:
            print(f"{name}:", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="ssvm-bench-", dir=_scratch()) as scratch:
                rows += bench(Path(scratch), size, given.runs)
    return results


if __name__ == "__main__":
    sys.exit(main())
