"""``ssvm top``: a live view of the workers and jobs of a zone."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from contextlib import closing, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from ssvm_worker import config
from ssvm_worker.config.schema import Settings
from ssvm_worker.units import parse_duration
from ssvm_worker.wiring import assembly

from . import job_text
from .output import Output
from .queue import job_rows

if TYPE_CHECKING:
    from ssvm_worker.ledger.ledger import Ledger

#: Clears the terminal from the first line: ECMA-48, CUP and ED.
_CLEAR = "\x1b[H\x1b[J"
#: The most jobs that are read. A terminal shows fewer.
_MOST = 200


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm top``."""
    parser = commands.add_parser(
        "top",
        help="show the workers and jobs of a zone, and update the view until Ctrl-C",
        examples=("top", "top --zone zone2 --interval 5s", "top --once"),
        parents=[common],
    )
    parser.add_argument("--zone", help="show this zone (default: the zone of the settings)")
    parser.add_argument("--interval", metavar="TIME", type=_duration, default=2.0, help="time between updates (2s)")
    parser.add_argument("--once", action="store_true", help="print the view once, as it does without a terminal")
    parser.set_defaults(command=_top)


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _top(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    zone = args.zone or settings.zone
    is_live = sys.stdout.isatty() and not (args.once or output.as_json)
    with assembly.open_ledger(settings) as ledger:
        if not is_live:
            view = _view(settings, ledger, zone, output.width)
            output.result(view["json"], "\n".join(view["lines"]))
            return 0
        with suppress(KeyboardInterrupt):  # how a user ends the view
            while True:
                view = _view(settings, ledger, zone, output.width)
                lines, height = view["lines"], shutil.get_terminal_size().lines
                if len(lines) > height:
                    lines = [*lines[: height - 1], f"… {len(lines) - height + 1} more lines"]
                print(_CLEAR + "\n".join(lines), end="", flush=True)
                time.sleep(max(0.1, args.interval))
    print()
    return 0


def _view(settings: Settings, ledger: Ledger, zone: str, width: int | None) -> dict[str, Any]:
    """Return the state of the zone as JSON and as lines."""
    from ssvm_worker.ledger.job_filter import JobFilter  # imports the records
    from ssvm_worker.operations.health import similar_zone  # imports redis

    with closing(assembly.open_registry(settings)) as registry:
        workers = registry.workers(zone)
    up = [each.info for each in workers if each.state == "Up" and each.info.connected]
    states = ("running", "queued")
    found = [[*islice(ledger.find(JobFilter(states=(state,), zone=zone)), _MOST)] for state in states]
    pairs = [(record, assembly.shown(record)) for records in found for record in records]
    busy = f"{sum(each.active for each in up)} of {sum(each.capacity for each in up)} places in use"
    workers_up = f"{len(up)} worker{'s' if len(up) != 1 else ''} up"
    head = f"zone {zone}   {time.strftime('%H:%M:%S', time.gmtime())} UTC   {workers_up}   {busy}"
    counts = f"{len(found[0])} running   {len(found[1])} queued{' or more' if len(found[1]) == _MOST else ''}"
    nothing = f"no jobs run or wait{similar_zone(settings, zone)}"
    jobs = list(job_text.table(job_rows(settings, pairs), width)) if pairs else [nothing]
    value = {"zone": zone, "workers": [each.to_dict() for each in workers], "jobs": [shown for _, shown in pairs]}
    return {"json": value, "lines": [head, counts, "", *jobs]}
