"""``ssvm workers``: who would run a job, and how busy they are."""

from __future__ import annotations

import argparse
from typing import Any

from ssvm_worker import config
from ssvm_worker.wiring import assembly

from .output import Output


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm workers``."""
    workers = commands.add_parser(
        "workers", help="the workers there are: Up, Draining or Down, and how busy", parents=[common]
    )
    workers.add_argument("--zone", help="of this zone alone")
    workers.set_defaults(command=_workers)


def _workers(args: argparse.Namespace, output: Output) -> int:
    registry = assembly.open_registry(config.load(args.config))
    rows = [each.to_dict() for each in registry.workers(args.zone)]
    shown = [_shown(row) for row in rows]
    columns = ("worker", "state", "zone", "lanes", "busy", "away", "version", "seen")
    output.table(rows if output.as_json else shown, columns, "no worker has been heard of")
    return 0


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    lanes, busy = ",".join(row["lanes"]), f"{row['active']}/{row['capacity']}"
    return row | {"lanes": lanes, "busy": busy, "away": ",".join(row["away"])}
