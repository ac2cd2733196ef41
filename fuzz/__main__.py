"""`make fuzz`: runs atheris against every parser of untrusted bytes.

`make fuzz ARGS='tar ovf' SECONDS=600` chooses the targets and the time. Each target has its own process and an equal
share of the time. A crash is any exception except WorkerError, 10 seconds for one input, or more than 1 GiB of memory.
The program prints the input of a crash. Add this input to the tables of the tests.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .targets import TARGETS

SECONDS = 60


def main() -> int:
    """Return 1 if any target crashed."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"fuzz only {' '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"total run time (default: {SECONDS})")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"unknown target {' '.join(sorted(unknown))}; choose from {' '.join(TARGETS)}")
    names = args.targets or list(TARGETS)
    bad = [name for name in names if not _survives(name, max(1, args.seconds // len(names)))]
    return 1 if bad else 0


def _survives(name: str, seconds: int) -> bool:
    """Fuzz one target in its own process and print one line. After a crash, also print the report and the input."""
    with tempfile.TemporaryDirectory(prefix="ssvm-fuzz-") as folder:
        command = [sys.executable, "-m", "fuzz.child", name, str(seconds), folder]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        inputs = [path.read_bytes() for path in Path(folder).glob("found-*")]
    runs = re.findall(r"Done (\d+) runs", done.stdout + done.stderr) or re.findall(r"#(\d+)", done.stderr) or ["0"]
    print(f"{name:16} {int(runs[-1]):>10} runs  {'nothing found' if done.returncode == 0 else 'FOUND'}", flush=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], *(f"input: {each!r}" for each in inputs), sep="\n")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
