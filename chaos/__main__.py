"""``python -m chaos --faults 200 --seed 7``: hurts a zone of its own on this machine, and prints a table."""

from __future__ import annotations

import argparse
import random
import sys

from .rounds import Broken, Run
from .table import table
from .town import Town


def main() -> int:
    """0 if all invariants held, else 1, with what broke and where the logs are."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, help="of a run that shall be made again; a random one when absent")
    parser.add_argument("--workers", type=int, default=2, help="that run at once, with two jobs each (2)")
    args = parser.parse_args()
    seed = random.randrange(1_000_000) if args.seed is None else args.seed
    with Town(args.workers) as town:
        print(f"chaos: seed {seed}, {args.faults} faults; everything lies in {town.scratch}", flush=True)
        run = Run(town, seed, lambda line: print(line, flush=True))
        try:
            run.run(args.faults)
        except Broken as error:
            print(error, flush=True)
            print(table(run.tally))
            return 1
        except KeyboardInterrupt:
            print("chaos: stopped; the last round was not looked at", flush=True)
    print(table(run.tally))
    town.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
