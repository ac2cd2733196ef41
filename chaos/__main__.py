"""``python -m chaos --faults 200 --seed 7``: injects faults into a zone on this machine and prints a table."""

from __future__ import annotations

import argparse
import random
import sys

from .rounds import Broken, Run
from .table import table
from .zone import ChaosZone


def main() -> int:
    """Return 0 if all invariants hold. Else print the violations and the folder of the logs, and return 1."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, metavar="N", help="inject N faults (default: 200)")
    parser.add_argument("--seed", type=int, help="repeat the run with this seed (default: a random seed)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="run N workers (default: 2)")
    args = parser.parse_args()
    seed = random.randrange(1_000_000) if args.seed is None else args.seed
    with ChaosZone(args.workers) as zone:
        print(f"chaos: seed {seed}, {args.faults} faults; files and logs are in {zone.scratch}", flush=True)
        run = Run(zone, seed, lambda line: print(line, flush=True))
        try:
            run.run(args.faults)
        except Broken as error:
            print(error, flush=True)
            print(table(run.tally))
            return 1
        except KeyboardInterrupt:
            print("chaos: stopped; the last round was not checked", flush=True)
    print(table(run.tally))
    zone.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
